"""Formats whose calls are JSON objects with the function's name in them: Hermes, Llama 3, Granite, older Mistral."""

from __future__ import annotations

import secrets
import string

from jaxllm.server.parsing.events import CallArguments, CallEnd, CallStart, NewId, Tools
from jaxllm.server.parsing.formats import CallFormat
from jaxllm.server.parsing.json_text import json_calls, json_value
from jaxllm.server.parsing.source import Source, Steps


def _tagged(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; the end may be missing, or stand behind braces."""
    yield from src.spaces()
    if not (yield from json_calls(src, tools, new_id)):
        return False
    mark = src.pos
    yield from src.spaces()
    while (yield from src.take("}", "]")):
        yield from src.spaces()
    if not (yield from src.take("</tool_call>")):
        src.pos = mark
    return True


def _bare(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    """`{"name": ..., "parameters": {...}}` anywhere, several apart by `;`."""
    if opened_by == "{":
        src.pos -= 1
    else:
        yield from src.spaces()
    if not (yield from json_calls(src, tools, new_id)):
        return False
    mark = src.pos
    yield from src.spaces()
    if not (yield from src.take(";")):
        src.pos = mark
    return True


def _named(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    """`[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]...` before the arguments in some, or an array of objects."""
    yield from src.spaces()
    if (yield from src.next_char()) in ("[", "{"):
        return (yield from json_calls(src, tools, new_id))
    name, marker = yield from src.capture("[ARGS]", "[CALL_ID]", "{")
    if name.strip() not in tools or not marker:
        return False
    given = ""
    if marker == "[CALL_ID]":
        given, marker = yield from src.capture("[ARGS]", "{")
    if marker == "{":
        src.pos -= 1
    yield from src.spaces()
    if (yield from src.next_char()) != "{":
        return False
    yield CallStart(name.strip(), given.strip() or new_id())
    yield CallEnd((yield from json_value(src, CallArguments)))
    return True


def _mistral_id() -> str:
    """Nine letters and digits, which the templates insist on."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


HERMES = CallFormat(opens=("<tool_call>",), block=_tagged, markers=("<tool_call>", "</tool_call>"))
LLAMA3 = CallFormat(opens=("<|python_tag|>", "{"), block=_bare, markers=("<|python_tag|>",))
GRANITE = CallFormat(
    opens=("<|tool_call|>", "<tool_call>"), block=_tagged, markers=("<|tool_call|>", "<tool_call>", "</tool_call>")
)
MISTRAL = CallFormat(
    opens=("[TOOL_CALLS]",), block=_named, markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), new_id=_mistral_id
)
