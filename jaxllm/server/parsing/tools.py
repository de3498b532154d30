"""Tool calls in a model's text: the Hermes/Qwen and the Llama 3 formats, parsed as the text streams in.

Text -> pieces of ordinary text and whole calls. A call is handed on when it is complete and its arguments are a
JSON object, so what a client puts together is always valid; what only looks like a call stays text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.server.errors import ApiError
from jaxllm.server.schema.requests import NamedTool, Tool

PARSERS = ("auto", "hermes", "llama3_json")
_MAX_CALL_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """One function call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def shaped(self, index: int | None = None) -> dict[str, Any]:
        """As OpenAI writes it; deltas carry an index."""
        function = {"name": self.name, "arguments": self.arguments}
        head = {} if index is None else {"index": index}
        return head | {"id": self.id, "type": "function", "function": function}


Piece = str | Call


class ToolParser(Protocol):
    """Takes text as it comes; `finish` gives what was held back."""

    def push(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class PlainText:
    """No tools: everything is text."""

    def push(self, text: str) -> list[Piece]:
        """Pass it on."""
        return [text] if text else []

    def finish(self) -> list[Piece]:
        """Nothing is held back."""
        return []


class HermesParser:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, text around them."""

    START, END = "<tool_call>", "</tool_call>"

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._held = ""
        self._inside = False

    def push(self, text: str) -> list[Piece]:
        """Calls that are complete, and text that belongs to none."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            marker = self.END if self._inside else self.START
            before, found, after = self._held.partition(marker)
            if not found:
                break
            pieces += self._call(before) if self._inside else _text(before.rstrip())
            self._held, self._inside = after, not self._inside
        if not self._inside:
            keep = _overlap(self._held, self.START)
            # Whitespace before a call is no text; it is held back until something follows.
            stripped = len(self._held[: len(self._held) - keep].rstrip())
            pieces += _text(self._held[:stripped])
            self._held = self._held[stripped:]
        elif len(self._held) > _MAX_CALL_CHARS:
            return pieces + self.finish()
        return pieces

    def finish(self) -> list[Piece]:
        """A call whose end marker is missing still counts if it is whole."""
        held, self._held = self._held, ""
        inside, self._inside = self._inside, False
        if not inside:
            return _text(held)
        call = parse_call(held, self._names)
        return [call] if call else [self.START + held]

    def _call(self, text: str) -> list[Piece]:
        call = parse_call(text, self._names)
        return [call] if call else [self.START + text + self.END]


class Llama3Parser:
    """A whole answer that is JSON: `{"name": ..., "parameters": {...}}`, several apart by `;`."""

    TAG = "<|python_tag|>"

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        """Text as soon as it cannot be a call any more; calls come at the end."""
        if self._is_text:
            return _text(text)
        self._held += text
        start = self._held.lstrip()
        maybe = not start or start[0] == "{" or start.startswith(self.TAG) or self.TAG.startswith(start)
        if maybe and len(self._held) <= _MAX_CALL_CHARS:
            return []
        self._is_text = True
        held, self._held = self._held, ""
        return _text(held)

    def finish(self) -> list[Piece]:
        """All calls, or the text if it is not made of calls."""
        held, self._held = self._held, ""
        rest = held.strip().removeprefix(self.TAG).strip()
        calls: list[Piece] = []
        decoder = json.JSONDecoder()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return _text(held)
            if (call := _as_call(value, self._names)) is None:
                return _text(held)
            calls.append(call)
            rest = rest[end:].lstrip("; \n\t")
        return calls or _text(held)


class ForcedCallParser:
    """An answer that a grammar made one call (`tool_choice` required or named)."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        """Wait for the end."""
        self._held += text
        return []

    def finish(self) -> list[Piece]:
        """The call; its text where it was cut off."""
        call = parse_call(self._held, self._names)
        return [call] if call else _text(self._held)


def make_parser(kind: str, template: str | None, names: Sequence[str], *, forced: bool) -> ToolParser:
    """The parser for one completion; `auto` looks at the model's chat template."""
    if not names:
        return PlainText()
    if forced:
        return ForcedCallParser(names)
    if kind == "auto":
        looks_like_llama = template is not None and "<tool_call>" not in template and "ipython" in template
        kind = "llama3_json" if looks_like_llama else "hermes"
    return Llama3Parser(names) if kind == "llama3_json" else HermesParser(names)


def forced_schema(tools: Sequence[Tool], choice: NamedTool | str | None) -> StructuredOutputs | None:
    """The grammar of an answer that must be a call."""
    if choice in (None, "none", "auto"):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise ApiError(
                400, f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice"
            )
    if not tools:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools; give some", param="tool_choice")
    schemas = [_call_schema(tool) for tool in tools]
    return StructuredOutputs(json=schemas[0] if len(schemas) == 1 else {"anyOf": schemas})


def _call_schema(tool: Tool) -> dict[str, Any]:
    arguments = tool.function.parameters or {"type": "object"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def parse_call(text: str, names: Sequence[str]) -> Call | None:
    """The call that `text` is, if it is one of a known function."""
    try:
        return _as_call(json.loads(text), names)
    except (ValueError, RecursionError):
        return None


def _as_call(value: Any, names: Sequence[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _text(text: str) -> list[Piece]:
    return [text] if text else []


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
