"""Gemma 4's calls, `<|tool_call>call:f{city:<|"|>Paris<|"|>,days:3}<tool_call|>`: JSON but for its quotes and keys."""

from __future__ import annotations

import json

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, NewId, Tools
from jaxllm.parsing.formats import CallFormat
from jaxllm.parsing.source import Source, Steps

_QUOTE = '<|"|>'
_END = "<tool_call|>"


def _block(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    yield from src.take("call:")
    name = yield from src.take(*tools)
    if not name or not (yield from src.take("{")):
        return False
    yield CallStart(name, new_id())
    yield CallArguments("{")
    complete = yield from _rest_of_object(src)
    yield CallEnd(complete)
    mark = src.pos
    yield from src.spaces()
    if not (yield from src.take(_END)):
        src.pos = mark
    return True


def _rest_of_object(src: Source) -> Steps[bool]:
    """Members behind an opening brace, up to the brace that closes it; false where something else comes."""
    depth, before = ["}"], ""
    while depth:
        yield from src.spaces()
        if (yield from src.take(depth[-1])):
            yield CallArguments(depth.pop())
            before = ", "
            continue
        if before:
            if not (yield from src.take(",")):
                return False
            yield from src.spaces()
        head, before = before, ", "
        if depth[-1] == "}":
            key = yield from _key(src)
            if key is None:
                return False
            head += f"{key}: "
        opened = yield from src.take("{", "[")
        if opened:
            yield CallArguments(head + opened)
            depth.append("}" if opened == "{" else "]")
            before = ""
        elif not (yield from _scalar(src, head)):
            return False
    return True


def _key(src: Source) -> Steps[str | None]:
    quoted = yield from src.take(_QUOTE)
    key, found = yield from src.capture(f"{_QUOTE}:" if quoted else ":")
    return json.dumps(key, ensure_ascii=False) if found else None


def _scalar(src: Source, head: str) -> Steps[bool]:
    if (yield from src.take(_QUOTE)):
        yield CallArguments(f'{head}"')
        found = yield from src.until((_QUOTE,), lambda text: CallArguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        if found:
            yield CallArguments('"')
        return bool(found)
    text = ""
    while (char := (yield from src.next_char())) and char not in ",}] \n":
        text += char
        src.pos += 1
    if not char or not text:
        return False
    yield CallArguments(head + text)
    return True


GEMMA4 = CallFormat(opens=("<|tool_call>",), block=_block, markers=("<|tool_call>", _END, _QUOTE))
