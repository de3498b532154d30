"""Blocks of Anthropic's messages API <-> messages of a conversation, and the events of an answer as blocks.

Knows the shapes of blocks; nothing of HTTP or of engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, Event, Reasoning, Text
from jaxllm.schema.messages_request import (
    Block,
    MessageParam,
    MessagesTool,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from jaxllm.schema.tools import Tool

Json = dict[str, Any]
Send = Callable[..., bytes]


def messages_of(system: str | Sequence[TextBlock] | None, given: Sequence[MessageParam]) -> list[Json]:
    """The conversation as chat templates take it; each tool result is a message of its own."""
    messages: list[Json] = []
    if text := _joined(system):
        messages.append({"role": "system", "content": text})
    for message in given:
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_assistant(message.content))
        else:
            messages += _user(message.role, message.content)
    return messages


def _joined(blocks: str | Sequence[TextBlock] | None) -> str:
    return blocks if isinstance(blocks, str) else "\n".join(block.text for block in blocks or ())


def _assistant(blocks: Sequence[Block]) -> Json:
    message: Json = {"role": "assistant"}
    message["content"] = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    if thoughts := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
        message["reasoning_content"] = thoughts
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    return message | ({"tool_calls": calls} if calls else {})


def _call(block: ToolUseBlock) -> Json:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _user(role: str, blocks: Sequence[Block]) -> Iterator[Json]:
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _joined(block.content)}
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    if texts or not blocks:
        yield {"role": role, "content": _joined(texts)}


def tools_of(given: Sequence[MessagesTool] | None) -> list[Tool]:
    """Functions as the other APIs write them."""
    return [
        Tool.model_validate(
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
        )
        for tool in given or ()
    ]


@final
class BlockWriter:
    """Builds an answer's blocks event by event; each event gives the documented stream events.

    Args:
        send: encodes one stream event of a type with its fields.
    """

    def __init__(self, send: Send):
        self.blocks: list[Json] = []
        self._send = send
        self._open = False
        self._arguments = ""

    @property
    def has_calls(self) -> bool:
        """Whether the model called anything."""
        return any(block["type"] == "tool_use" for block in self.blocks)

    def write(self, events: Iterable[Event]) -> Iterator[bytes]:
        """Stream events of the answer's next events."""
        for event in events:
            match event:
                case Text():
                    yield from self._grow("text", "text", "text_delta", event.text)
                case Reasoning():
                    yield from self._grow("thinking", "thinking", "thinking_delta", event.text)
                case CallStart():
                    yield from self.close()
                    self._arguments = ""
                    yield self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
                case CallArguments():
                    self._arguments += event.text
                    yield self._delta("input_json_delta", "partial_json", event.text)
                case CallEnd():
                    self.blocks[-1]["input"] = _object(self._arguments)
                    yield from self.close()

    def _grow(self, kind: str, field: str, delta: str, text: str) -> Iterator[bytes]:
        if not self._open or self.blocks[-1]["type"] != kind:
            yield from self.close()
            yield self._begin({"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self.blocks[-1][field] += text
        yield self._delta(delta, field, text)

    def _begin(self, block: Json) -> bytes:
        self.blocks.append(block)
        self._open = True
        return self._send("content_block_start", index=len(self.blocks) - 1, content_block=dict(block))

    def _delta(self, kind: str, field: str, text: str) -> bytes:
        return self._send("content_block_delta", index=len(self.blocks) - 1, delta={"type": kind, field: text})

    def close(self) -> Iterator[bytes]:
        """End the block that is open, if one is."""
        if self._open:
            if self.blocks[-1]["type"] == "thinking":
                yield self._delta("signature_delta", "signature", "")
            yield self._send("content_block_stop", index=len(self.blocks) - 1)
            self._open = False


def _object(text: str) -> Json:
    """A call's arguments; where the answer ended within them there are none."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
