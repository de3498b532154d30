"""Requests as OpenAI and vLLM clients send them, every field bounded. Names and meanings are theirs.

Fields that are unknown here are ignored, as those servers do; known ones that cannot be honoured and misspelt ones
are refused. What the JSON schema of a class cannot derive from its types (`rules`) is checked where it is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, WithJsonSchema
from pydantic.config import JsonDict

from jaxllm.config.sampling import MAX_LOGPROBS, MAX_N
from jaxllm.server.schema.fields import (
    STREAM_RULES,
    UNSUPPORTED,
    Body,
    Model,
    Name,
    SamplingFields,
    Schema,
    Text,
    Texts,
    Token,
    TokenLists,
    Tokens,
)  # fmt: skip
from jaxllm.server.schema.schema_rules import NULL, absent, either, exactly_one, given, only, rules
from jaxllm.tokenizer.chat_template import ALLOWED_VARIABLES


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    model_config = rules(
        *STREAM_RULES,
        either(
            only(max_tokens=either(NULL, {"minimum": 1})),
            given(echo={"const": True}) | only(echo={"const": True}, stream={"enum": [False, None]}),
        ),
    )

    prompt: Text | Tokens | Texts | TokenLists
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Annotated[Text, WithJsonSchema(UNSUPPORTED | {"const": ""})] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N, description="At most n.")] | None = None


class FunctionCall(Model):
    """A call the model made, as clients send it back."""

    name: Name
    arguments: Annotated[Text, Field(description="The text of a JSON object.", examples=["{}"])] | dict[str, Any]


class ToolCall(Model):
    """One entry of a message's `tool_calls`."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(Model):
    """A part of a message; only text is understood."""

    model_config = rules(given(type={"const": "text"}, text={"type": "string"}))

    type: Name
    text: Text | None = None


class ChatMessage(Model):
    """One message of a conversation; its content may only be missing beside `tool_calls`."""

    model_config = rules(
        either(given(content={"type": ["string", "array"]}), given(tool_calls={"type": "array", "minItems": 1}))
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[ContentPart], Field(max_length=4096)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]


class Function(Model):
    """A function the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Model):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(Model):
    """Which function `tool_choice` names."""

    name: Name


class NamedTool(Model):
    """`tool_choice` that names a function."""

    type: Literal["function"]
    function: FunctionName


_VARIABLE_NAMES: JsonDict = {"propertyNames": {"enum": [*sorted(ALLOWED_VARIABLES)]}}
TemplateVariables = Annotated[dict[Name, Any], Field(max_length=32, json_schema_extra=_VARIABLE_NAMES)]


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    model_config = rules(
        *STREAM_RULES,
        either(absent("top_logprobs"), given(logprobs={"const": True})),
        either(only(tool_choice={"enum": ["none", "auto", None]}), given(tools={"type": "array", "minItems": 1})),
    )

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    chat_template_kwargs: TemplateVariables | None = None
    add_generation_prompt: bool = True


class ResponsePart(Model):
    """A part of `input`; only text is understood."""

    model_config = rules(given(type={"enum": ["input_text", "output_text", "text"]}, text={"type": "string"}))

    type: Name
    text: Text | None = None


class ResponseItem(Model):
    """One message of `input`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ResponsePart], Field(min_length=1, max_length=4096)]


class ResponseTextFormat(Model):
    """`text.format` of the responses API."""

    model_config = rules(either(only(type={"enum": ["text", "json_object"]}), given(schema={"type": "object"})))

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(Model):
    """`text` of the responses API."""

    format: ResponseTextFormat | None = None


class ResponsesRequest(Body):
    """`POST /v1/responses`, text only."""

    model: Name | None = None
    input: Text | Annotated[list[ResponseItem], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=1e-9, le=1)] | None = None
    stream: bool | None = None
    text: ResponseText | None = None
    tools: Annotated[list[dict[str, Any]], WithJsonSchema(UNSUPPORTED | {"type": "array", "maxItems": 0})] | None = None
    previous_response_id: Annotated[Name, WithJsonSchema(UNSUPPORTED | {"const": ""})] | None = None
    background: Annotated[bool, WithJsonSchema(UNSUPPORTED | {"const": False})] | None = None
    metadata: Annotated[dict[Name, Any], Field(max_length=16)] | None = None
    user: Name | None = None


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: Name | None = None
    input: Text | Tokens | Texts | TokenLists
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Name | None = None


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation through the chat template."""

    model_config = rules(exactly_one(prompt={"type": "string"}, messages={"type": "array"}))

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[Token], Field(max_length=2**20, fail_fast=True)]
