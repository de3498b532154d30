"""`POST /v1/responses` as OpenAI's clients send it: items in, a response out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, WithJsonSchema

from jaxllm.schema.fields import UNSUPPORTED, Lenient, Model, Name, SamplingFields, Schema, Text
from jaxllm.schema.schema_rules import either, given, only, rules
from jaxllm.schema.tools import MAX_TOOLS, AllowedTools, FunctionNameText, NamedTool

MAX_ITEMS = 4096
_TEXTS = ["input_text", "output_text", "text", "summary_text", "reasoning_text"]


class ResponsePart(Model):
    """A part of an item's content; only text is understood."""

    model_config = rules(
        either(
            given(type={"enum": _TEXTS}, text={"type": "string"}),
            given(type={"const": "refusal"}, refusal={"type": "string"}),
        )
    )

    type: Name
    text: Text | None = None
    refusal: Text | None = None


Parts = Annotated[list[ResponsePart], Field(max_length=MAX_ITEMS)]


class MessageItem(Model):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts


class CallItem(Model):
    """A call the model made, as clients send it back."""

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: Annotated[Text, Field(description="The text of a JSON object.", examples=["{}"])]


class OutputItem(Model):
    """What a call returned."""

    type: Literal["function_call_output"]
    call_id: Name
    output: Text | Parts


class ReasoningItem(Model):
    """What the model thought; its `content` is read, its `summary` where there is none."""

    type: Literal["reasoning"]
    summary: Parts | None = None
    content: Parts | None = None


class ReferenceItem(Model):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: Name


Item = MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem


class ResponseTool(Model):
    """A function the model may call."""

    type: Literal["function"]
    name: FunctionNameText
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseTextFormat(Model):
    """`text.format`."""

    model_config = rules(either(only(type={"enum": ["text", "json_object"]}), given(schema={"type": "object"})))

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseText(Model):
    """`text`."""

    format: ResponseTextFormat | None = None
    verbosity: Name | None = None


class ResponseReasoning(Model):
    """`reasoning`."""

    effort: Name | None = None
    summary: Name | None = None


class ResponsesRequest(SamplingFields):
    """`POST /v1/responses`."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: Text | None = None
    max_output_tokens: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    text: ResponseText | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ResponseReasoning | None = None
    previous_response_id: Annotated[Name, WithJsonSchema({"type": "string", "maxLength": 0})] | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: Annotated[list[Name], Field(max_length=16)] | None = None
    metadata: Annotated[dict[Name, Any], Field(max_length=16)] | None = None
    background: Annotated[bool, WithJsonSchema(UNSUPPORTED | {"const": False})] | None = None
    conversation: Annotated[Any, WithJsonSchema(UNSUPPORTED | {"type": "null"})] = None
    prompt: Annotated[Any, WithJsonSchema(UNSUPPORTED | {"type": "null"})] = None
    top_logprobs: Annotated[int, WithJsonSchema(UNSUPPORTED | {"const": 0})] | None = None


ResponseId = Annotated[str, StringConstraints(pattern=r"^resp_[A-Za-z0-9_.:-]{1,64}$")]
