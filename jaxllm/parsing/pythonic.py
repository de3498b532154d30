"""Calls written as a list of Python calls, `[f(a=1), g(b="x")]`: Llama 4, LFM2, OLMo 3."""

from __future__ import annotations

import json

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, NewId, Tools
from jaxllm.parsing.formats import CallFormat
from jaxllm.parsing.schema_types import typed
from jaxllm.parsing.source import Source, Steps

_OPENING, _CLOSING = "([{", ")]}"


def pythonic(*opens: str, close: str = "") -> CallFormat:
    """Between two markers, or wherever a list begins with the call of a known function if `[` is among `opens`."""

    def block(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
        yield from src.spaces()
        listed = opened_by == "[" or bool((yield from src.take("[")))
        called = False
        while True:
            mark = src.pos
            yield from src.spaces()
            if called and listed and (yield from src.take("]")):
                break
            if not (yield from _call(src, tools, new_id)):
                src.pos = mark
                break
            called = True
            yield from src.spaces()
            yield from src.take(",")
        mark = src.pos
        yield from src.spaces()
        if not (called and close and (yield from src.take(close))):
            src.pos = mark
        return called

    return CallFormat(opens=opens, block=block, markers=tuple(m for m in (*opens, close) if len(m) > 1))


def _call(src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
    """`name(key=value, ...)`; false, before any event, unless the first argument is well written."""
    name = yield from src.take(*tools)
    yield from src.spaces()
    if not name or not (yield from src.take("(")):
        return False
    written = 0
    while True:
        yield from src.spaces()
        if (yield from src.take(")")):
            break
        argument = yield from _argument(src)
        if not argument:
            if written:
                yield CallEnd(complete=False)
            return bool(written)
        if not written:
            yield CallStart(name, new_id())
        yield CallArguments(("{" if not written else ", ") + argument)
        written += 1
        yield from src.take(",")
    if not written:
        yield CallStart(name, new_id())
    yield CallArguments("}" if written else "{}")
    yield CallEnd()
    return True


def _argument(src: Source) -> Steps[str]:
    """`key=value` up to a comma or the end of the call, as a member of a JSON object; empty if it is none."""
    key = ""
    while (char := (yield from src.next_char())).isalnum() or char == "_":
        key += char
        src.pos += 1
    yield from src.spaces()
    if not key or not (yield from src.take("=")):
        return ""
    yield from src.spaces()
    value = yield from _expression(src)
    return f"{json.dumps(key, ensure_ascii=False)}: {typed(value, set())}" if value else ""


def _expression(src: Source) -> Steps[str]:
    """The text of a value; empty where it does not end."""
    text, quote, depth = "", "", 0
    while char := (yield from src.next_char()):
        if not quote and depth == 0 and char in ",)":
            return text.strip()
        src.pos += 1
        text += char
        if quote:
            if char == "\\":
                text += yield from src.next_char()
                src.pos += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            depth += (char in _OPENING) - (char in _CLOSING)
    return ""


PYTHONIC = pythonic("[")
LLAMA4 = pythonic("<|python_start|>", "[", close="<|python_end|>")
LFM2 = pythonic("<|tool_call_start|>", close="<|tool_call_end|>")
OLMO3 = pythonic("<function_calls>", close="</function_calls>")
