"""Requests as OpenAI and vLLM clients send them, every field bounded. Names and meanings are theirs.

Fields that are unknown here are ignored, as those servers do; known ones that cannot be honoured and misspelt ones
are refused. What the JSON schema of a class cannot derive from its types (`rules`) is checked where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, WithJsonSchema
from pydantic.config import JsonDict

from jaxllm.config.sampling import MAX_LOGPROBS, MAX_N
from jaxllm.schema.fields import (
    MAX_PROMPTS,
    STREAM_RULES,
    UNSUPPORTED,
    Body,
    GenerationFields,
    Lenient,
    Model,
    Name,
    Text,
    Texts,
    Token,
    TokenLists,
    Tokens,
)
from jaxllm.schema.schema_rules import NULL, absent, either, exactly_one, given, only, rules
from jaxllm.schema.tools import AllowedTools, NamedTool, Tool, ToolCall
from jaxllm.tokenizer.chat_template import ALLOWED_VARIABLES
from jaxllm.tokenizer.messages import ROLES


class CompletionRequest(GenerationFields):
    """`POST /v1/completions`."""

    model_config = rules(
        *STREAM_RULES,
        either(
            only(max_tokens=either(NULL, {"minimum": 1})),
            given(echo={"const": True}) | only(echo={"const": True}, stream={"enum": [False, None]}),
        ),
    )

    prompt: Text | Tokens | Texts | TokenLists
    max_tokens: Lenient[Annotated[int, Field(ge=0, lt=2**31)]] | None = 16
    logprobs: Lenient[Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    suffix: Annotated[Text, WithJsonSchema(UNSUPPORTED | {"const": ""})] | None = None
    best_of: Lenient[Annotated[int, Field(ge=1, le=MAX_N, description="At most n.")]] | None = None


class ContentPart(Model):
    """A part of a message; only text is understood, a refusal's text among it."""

    model_config = rules(
        either(
            given(type={"const": "text"}, text={"type": "string"}),
            given(type={"const": "refusal"}, refusal={"type": "string"}),
        )
    )

    type: Name
    text: Text | None = None
    refusal: Text | None = None


class ChatMessage(Model):
    """One message of a conversation; only what somebody typed cannot go without content."""

    model_config = rules(
        either(given(content={"type": ["string", "array"]}), given(role={"enum": ["assistant", "tool", "function"]}))
    )

    role: Annotated[str, StringConstraints(min_length=1, max_length=64), WithJsonSchema({"enum": list(ROLES)})]
    content: Text | Annotated[list[ContentPart], Field(max_length=4096)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]


_VARIABLE_NAMES: JsonDict = {"propertyNames": {"enum": [*sorted(ALLOWED_VARIABLES)]}}
TemplateVariables = Annotated[dict[Name, Any], Field(max_length=32, json_schema_extra=_VARIABLE_NAMES)]


class ChatRequest(GenerationFields):
    """`POST /v1/chat/completions`."""

    model_config = rules(
        *STREAM_RULES,
        either(absent("top_logprobs"), given(logprobs={"const": True})),
        either(only(tool_choice={"enum": ["none", "auto", None]}), given(tools={"type": "array", "minItems": 1})),
    )

    messages: Messages
    max_tokens: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    max_completion_tokens: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    logprobs: bool | None = None
    top_logprobs: Lenient[Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    include_reasoning: bool | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: Name | None = None
    input: Text | Tokens | Texts | TokenLists
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    user: Name | None = None


class ClassifyRequest(Body):
    """`POST /classify`; without `use_activation` the numbers are the head's own."""

    model: Name | None = None
    input: Text | Tokens | Texts | TokenLists
    use_activation: bool | None = None
    user: Name | None = None


Words = Annotated[str, StringConstraints(min_length=1, max_length=8 << 20)]
WordLists = Annotated[list[Words], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


class ScoreRequest(Body):
    """`POST /score`: one query or several, one text or several; `instruction` says what relevance means."""

    model: Name | None = None
    text_1: Words | WordLists
    text_2: Words | WordLists
    instruction: Text | None = None


class Document(Model):
    """A document, as Cohere's clients send it."""

    text: Words


class RerankRequest(Body):
    """`POST /rerank`; `top_n` results, all where it is 0."""

    model: Name | None = None
    query: Words
    documents: Annotated[list[Words | Document], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    top_n: Lenient[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    return_documents: bool | None = None
    instruction: Text | None = None


AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class LoadAdapterRequest(Body):
    """`POST /v1/load_lora_adapter`; `load_inplace` replaces what has the name."""

    lora_name: AdapterName
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    load_inplace: bool | None = None


class UnloadAdapterRequest(Body):
    """`POST /v1/unload_lora_adapter`; the name alone counts."""

    lora_name: AdapterName
    lora_int_id: Lenient[int] | None = None


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation through the chat template."""

    model_config = rules(exactly_one(prompt={"type": "string"}, messages={"type": "array"}))

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=2**20, fail_fast=True)]


class BatchRequest(Body):
    """`POST /v1/batches`."""

    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"]
    completion_window: Name = "24h"
    metadata: Annotated[dict[Name, Any], Field(max_length=16)] | None = None
