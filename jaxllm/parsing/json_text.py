"""JSON that is still arriving: strings, values that are passed on as they come, and a call written as an object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, Event, NewId, Tools
from jaxllm.parsing.source import Source, Steps

_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "tool_name")
_BESIDE = (
    "type",
    "id",
    "index",
    "tool_call_id",
)  # another key before the arguments: it is no call
_PLAIN = re.compile(r"[\s\w.,:+-]+")
_OUTSIDE = re.compile(r'[\s\w.,:+\-"{}\[\]]')
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]+')
_SCALAR = re.compile(r"[^,}\]\s]+")


def json_string(src: Source) -> Steps[str | None]:
    """Read a string and return its value; None if there is none or it is broken."""
    if not (yield from src.take('"')):
        return None
    parts = ['"']
    while True:
        text, marker = yield from src.capture('"', "\\")
        parts += [text, marker]
        if marker == "\\":
            parts.append((yield from src.next_char()))
            src.pos += len(parts[-1])
        else:
            break
    return as_string("".join(parts))


def as_string(text: str) -> str | None:
    """The value of a whole JSON string."""
    value = loads(text)
    return value if isinstance(value, str) else None


def loads(text: str) -> Any:
    """A value, or None where the text is no JSON."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def json_value(src: Source, make: Callable[[str], Event]) -> Steps[bool]:
    """Yield the text of an object or array as it comes; false where it breaks off, by its end or by what is no JSON.

    Line ends and other control characters within strings, which models write and JSON does not allow, are escaped.
    """
    scan = _ValueScan()
    while True:
        piece = scan.advance(src)
        if piece:
            yield make(piece)
        if scan.whole or scan.broken or src.ended:
            return scan.whole
        yield None


class _ValueScan:
    """Where in a value the text has come to."""

    def __init__(self) -> None:
        self.whole = self.broken = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def advance(self, src: Source) -> str:
        """Read what has arrived of the value."""
        text, used, out = src.rest, 0, []
        while used < len(text) and not (self.whole or self.broken):
            piece = self._piece(text, used)
            self._note(piece)
            if not self.broken:
                used += len(piece)
                out.append(json.dumps(piece)[1:-1] if self._in_string and piece < " " else piece)
        src.pos += used
        return "".join(out)

    def _piece(self, text: str, used: int) -> str:
        if not self._escaped and (plain := (_IN_STRING if self._in_string else _PLAIN).match(text, used)):
            return plain.group()
        return text[used]

    def _note(self, piece: str) -> None:
        if self._in_string:
            self._in_string = self._escaped or piece != '"'
            self._escaped = not self._escaped and piece == "\\"
            return
        self._in_string = piece == '"'
        self._depth += 1 if piece in ("{", "[") else -1 if piece in ("}", "]") else 0
        self.broken = (self._depth == 0 and piece not in ("}", "]")) or not _OUTSIDE.match(piece)
        self.whole = self._depth == 0 and not self.broken


def any_value(src: Source) -> Steps[str]:
    """Read a value of any kind and return its text."""
    first = yield from src.next_char()
    if first and first in "{[":
        parts: list[str] = []
        for step in json_value(src, CallArguments):
            if isinstance(step, CallArguments):
                parts.append(step.text)
            else:
                yield step
        return "".join(parts)
    if first == '"':
        return json.dumps((yield from json_string(src)), ensure_ascii=False)
    text = ""
    while _SCALAR.match(char := (yield from src.next_char())):
        src.pos += 1
        text += char
    return text


def json_call(src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
    """Read `{"name": ..., "arguments": {...}}`, the keys in any order; false, before any event, if it is no call.

    `parameters` is another name for `arguments`; a text with a JSON object in it counts as one, and so does OpenAI's
    `{"type": "function", "function": {...}}`. A call without arguments has `{}`.
    """
    if not (yield from src.take("{")):
        return False
    name, arguments = "", "{}"
    while (yield from _has_member(src)):
        key = yield from _key(src)
        if key in _NAMES:
            name = (yield from json_string(src)) or ""
            if name not in tools:
                return False
        elif key in _ARGUMENTS and name and (yield from _opens_object(src)):
            yield from named_arguments(src, name, new_id())
            yield from _rest_of_object(src)
            return True
        elif key in _ARGUMENTS:
            arguments = yield from any_value(src)
        elif key == "function":
            called = yield from json_call(src, tools, new_id)
            if called:
                yield from _rest_of_object(src)
            return called
        elif key in _BESIDE:
            yield from any_value(src)
        else:
            return False
    text = _object_text(arguments)
    if not name or text is None or not (yield from src.take("}")):
        return False
    yield from whole_call(name, text, new_id)
    return True


def named_arguments(src: Source, name: str, call_id: str) -> Steps[bool]:
    """Read the arguments of a function whose name was read; false, before any event, if no object follows."""
    yield from src.spaces()
    if not (yield from _opens_object(src)):
        return False
    yield CallStart(name, call_id)
    yield CallEnd((yield from json_value(src, CallArguments)))
    return True


def whole_call(name: str, arguments: str, new_id: NewId) -> Steps[None]:
    """A call whose arguments are all known."""
    yield CallStart(name, new_id())
    yield CallArguments(arguments)
    yield CallEnd()


def json_calls(src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
    """One call, or an array of them; false if not even the first is one."""
    if not (yield from src.take("[")):
        return (yield from json_call(src, tools, new_id))
    yield from src.spaces()
    called = False
    while (yield from src.next_char()) == "{":
        mark = src.pos
        if not (yield from json_call(src, tools, new_id)):
            src.pos = mark
            return called
        called = True
        yield from src.spaces()
        yield from src.take(",")
        yield from src.spaces()
    yield from src.take("]")
    return called


def _has_member(src: Source) -> Steps[bool]:
    yield from src.spaces()
    yield from src.take(",")
    yield from src.spaces()
    return (yield from src.next_char()) not in ("}", "")


def _key(src: Source) -> Steps[str | None]:
    key = yield from json_string(src)
    yield from src.spaces()
    colon = yield from src.take(":")
    yield from src.spaces()
    return key if colon else None


def _opens_object(src: Source) -> Steps[bool]:
    """Whether an object follows whose first key, if any, is in quotes; nothing is read."""
    mark = src.pos
    opened = yield from src.take("{")
    yield from src.spaces()
    first = yield from src.next_char()
    src.pos = mark
    return bool(opened) and first in ('"', "}")


def _rest_of_object(src: Source) -> Steps[None]:
    """Members after the arguments, and the end."""
    while (yield from _has_member(src)):
        if (yield from src.next_char()) != '"' or (yield from _key(src)) is None:
            return
        yield from any_value(src)
    yield from src.take("}")


def _object_text(text: str) -> str | None:
    """The text of the object that a call's arguments are; None where they are none."""
    value = loads(text)
    if isinstance(value, str):
        text, value = value, loads(value)
    if text == "null":
        return "{}"
    return text if isinstance(value, dict) else None
