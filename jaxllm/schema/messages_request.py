"""`POST /v1/messages` as Anthropic's clients send it: blocks in, blocks out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jaxllm.config.sampling import MAX_STOP_STRINGS
from jaxllm.schema.fields import Lenient, Model, Name, SamplingFields, StopText, Text
from jaxllm.schema.tools import MAX_TOOLS, FunctionNameText

MAX_BLOCKS = 4096


class TextBlock(Model):
    """Text."""

    type: Literal["text"]
    text: Text


class ThinkingBlock(Model):
    """What the model thought, as clients send it back."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = None


class HiddenBlock(Model):
    """Thoughts of another server that cannot be read; they are left out."""

    type: Literal["redacted_thinking"]
    data: Text | None = None


class ToolUseBlock(Model):
    """A call the model made."""

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


class ToolResultBlock(Model):
    """What a call returned."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None


Block = TextBlock | ThinkingBlock | HiddenBlock | ToolUseBlock | ToolResultBlock


class MessageParam(Model):
    """What somebody said."""

    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[Block], Field(max_length=MAX_BLOCKS)]


class MessagesTool(Model):
    """A function the model may call."""

    type: Literal["custom"] | None = None
    name: FunctionNameText
    description: Text | None = None
    input_schema: dict[str, Any] | None = None


class MessagesToolChoice(Model):
    """`auto`, `any` (must call), `tool` (must call that one) or `none`."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Model):
    """Whether the model is to think first, where its template can say so."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    display: Name | None = None


class Prompted(SamplingFields):
    """What a message and the count of its tokens share."""

    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_BLOCKS, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(Prompted):
    """`POST /v1/messages`."""

    max_tokens: Lenient[Annotated[int, Field(ge=1, lt=2**31)]]
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    metadata: Annotated[dict[Name, Any], Field(max_length=16)] | None = None


class CountTokensRequest(Prompted):
    """`POST /v1/messages/count_tokens`."""
