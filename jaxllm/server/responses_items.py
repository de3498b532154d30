"""Items of the responses API <-> messages of a conversation, and the events of an answer as items.

Knows the shapes of items; nothing of HTTP or of engines.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, Event, Reasoning, Text
from jaxllm.schema.responses_request import (
    CallItem,
    Item,
    MessageItem,
    OutputItem,
    ReasoningItem,
    ResponsePart,
)
from jaxllm.server.errors import ApiError

Json = dict[str, Any]
Send = Callable[..., bytes]


def messages_of(items: Sequence[Item | Json], stored: Mapping[str, Json]) -> list[Json]:
    """A conversation: what the model thought, said and called in one go is one message.

    Args:
        items: of a request, or of an answer.
        stored: items of earlier answers by id, which references name.
    """
    messages: list[Json] = []
    for item in items:
        message = _message(item, stored)
        last = messages[-1] if messages else {}
        if message["role"] == "assistant" == last.get("role") and _belongs(last, message):
            calls = [*last.get("tool_calls", ()), *message.get("tool_calls", ())]
            last |= message | ({"tool_calls": calls} if calls else {})
        else:
            messages.append(message)
    return messages


_ORDER = ("reasoning_content", "content", "tool_calls")


def _belongs(last: Json, message: Json) -> bool:
    """Whether a message goes on where the last one ended: thoughts, then text, then any number of calls."""
    done = max(n for n, name in enumerate(_ORDER) if name in last)
    first = min(n for n, name in enumerate(_ORDER) if name in message)
    return first > done or first == done == _ORDER.index("tool_calls")


def _message(item: Item | Json, stored: Mapping[str, Json]) -> Json:
    match item:
        case MessageItem():
            return {"role": item.role, "content": _text(item.content)}
        case CallItem():
            return _assistant_call(item.call_id, item.name, item.arguments)
        case OutputItem():
            return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
        case ReasoningItem():
            return {"role": "assistant", "reasoning_content": _text(item.content or item.summary or [])}
        case dict():
            return _answered(item)
        case _:
            if item.id not in stored:
                raise ApiError(400, f"item {item.id!r} is not stored; send the item itself", param="input")
            return _answered(stored[item.id])


def _answered(item: Json) -> Json:
    """An item of an answer."""
    if item["type"] == "function_call":
        return _assistant_call(item["call_id"], item["name"], item["arguments"])
    text = "".join(part["text"] for part in item["content"])
    return {"role": "assistant", "content" if item["type"] == "message" else "reasoning_content": text}


def _assistant_call(call_id: str, name: str, arguments: str) -> Json:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def _text(content: str | Iterable[ResponsePart]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if text is None or part.type.endswith(("image", "file", "audio")):
            raise ApiError(400, f"content of type {part.type[:50]!r} is not supported; only text is", param="input")
        texts.append(text)
    return "\n".join(texts)


@final
class ItemWriter:
    """Builds an answer's items event by event; each event gives OpenAI's stream events.

    Args:
        send: encodes one stream event of a type with its fields.
    """

    def __init__(self, send: Send):
        self.items: list[Json] = []
        self._send = send
        self._open: Json | None = None

    def write(self, events: Iterable[Event]) -> Iterator[bytes]:
        """Stream events of the answer's next events."""
        for event in events:
            match event:
                case Text():
                    yield from self._grow("message", "response.output_text.delta", event.text, {"logprobs": []})
                case Reasoning():
                    yield from self._grow("reasoning", "response.reasoning_text.delta", event.text, {})
                case CallStart():
                    yield from self.close()
                    item = {"type": "function_call", "id": _new("fc"), "call_id": event.id, "name": event.name}
                    yield self._begin(item | {"arguments": "", "status": "in_progress"})
                case CallArguments():
                    assert self._open is not None, "arguments come within a call"
                    self._open["arguments"] += event.text
                    yield self._of_item("response.function_call_arguments.delta", delta=event.text)
                case CallEnd():
                    yield from self.close(complete=event.complete)

    def _grow(self, kind: str, name: str, text: str, extra: Json) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != kind:
            yield from self.close()
            yield from self._begin_text(kind)
        assert self._open is not None
        self._open["content"][0]["text"] += text
        yield self._of_item(name, content_index=0, delta=text, **extra)

    def _begin_text(self, kind: str) -> Iterator[bytes]:
        if kind == "message":
            item = {"type": kind, "id": _new("msg"), "status": "in_progress", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"type": kind, "id": _new("rs"), "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        yield self._begin(item)
        yield self._of_item("response.content_part.added", content_index=0, part=part)
        assert self._open is not None
        self._open["content"] = [dict(part)]

    def _begin(self, item: Json) -> bytes:
        self.items.append(item)
        self._open = item
        return self._send("response.output_item.added", output_index=len(self.items) - 1, item=dict(item))

    def close(self, *, complete: bool = True) -> Iterator[bytes]:
        """End the item that is open, if one is."""
        if (item := self._open) is None:
            return
        item["status"] = "completed" if complete else "incomplete"
        if item["type"] == "function_call":
            fields = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **fields)
        else:
            part, logprobs = item["content"][0], {"logprobs": []} if item["type"] == "message" else {}
            name = "output_text" if item["type"] == "message" else "reasoning_text"
            yield self._of_item(f"response.{name}.done", content_index=0, text=part["text"], **logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=part)
        yield self._send("response.output_item.done", output_index=len(self.items) - 1, item=item)
        self._open = None

    def finish(self, *, complete: bool) -> Iterator[bytes]:
        """End the answer; one that is empty is an empty message."""
        if not self.items:
            yield from self._begin_text("message")
        yield from self.close(complete=complete)

    def _of_item(self, kind: str, /, **fields: Any) -> bytes:
        assert self._open is not None
        return self._send(kind, item_id=self._open["id"], output_index=len(self.items) - 1, **fields)


def _new(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:32]}"
