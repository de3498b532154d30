"""Requests as OpenAI and vLLM clients send them, every field bounded. Names and meanings are theirs.

Fields that are unknown here are ignored, as those servers do; known ones that cannot be honoured are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from jaxllm.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MAX_PROMPTS = 1024
_TEXT = 8 << 20
Text = Annotated[str, StringConstraints(max_length=_TEXT)]
Name = Annotated[str, StringConstraints(max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=2**20)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class Model(BaseModel):
    """Strict: a number in quotes is text, and NaN is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)


class StreamOptions(Model):
    """What a stream carries beside its choices."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredFields(Model):
    """vLLM's `structured_outputs`."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Name], Field(min_length=1, max_length=1000)] | None = None
    grammar: Text | None = None


class JsonSchema(Model):
    """The schema of `response_format`."""

    name: Name | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingFields(Model):
    """What completions and chat completions share."""

    model: Name | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MAX_STOP_TOKEN_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] | None = None
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    return_token_ids: bool | None = None
    user: Name | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Text | Tokens | Texts | TokenLists
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None


class FunctionCall(Model):
    """A call the model made, as clients send it back."""

    name: Name
    arguments: Text | dict[str, Any]


class ToolCall(Model):
    """One entry of a message's `tool_calls`."""

    id: Name | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(Model):
    """A part of a message; only text is understood."""

    type: Name
    text: Text | None = None


class ChatMessage(Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[ContentPart], Field(max_length=4096)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    reasoning_content: Text | None = None


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


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    chat_template_kwargs: Annotated[dict[Name, Any], Field(max_length=32)] | None = None
    add_generation_prompt: bool = True


class ResponseItem(Model):
    """One message of `input`."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(min_length=1, max_length=4096)]


class ResponseTextFormat(Model):
    """`text.format` of the responses API."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(Model):
    """`text` of the responses API."""

    format: ResponseTextFormat | None = None


class ResponsesRequest(Model):
    """`POST /v1/responses`, text only."""

    model: Name | None = None
    input: Text | Annotated[list[ResponseItem], Field(min_length=1, max_length=4096)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    text: ResponseText | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    previous_response_id: Name | None = None
    background: bool | None = None
    metadata: Annotated[dict[Name, Any], Field(max_length=16)] | None = None
    user: Name | None = None


class EmbeddingRequest(Model):
    """`POST /v1/embeddings`."""

    model: Name | None = None
    input: Text | Tokens | Texts | TokenLists
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Name | None = None


class TokenizeRequest(Model):
    """`POST /tokenize`: a text, or a conversation through the chat template."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Model):
    """`POST /detokenize`."""

    model: Name | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
