"""Checks and plain copies of what users pass to a chat template.

Inputs: messages and tools as OpenAI clients send them. Outputs: fresh JSON values (a template never sees an
object of ours). It does not know any template.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_MAX_DEPTH = 64


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """Raises ValueError, one line, for anything that is not a list of messages."""
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f"messages is {got}; expected a non-empty list of {{'role', 'content'}}")
    return [_plain_message(message, f"messages[{n}]") for n, message in enumerate(messages)]


def plain_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of function definitions (JSON objects), or None")
    return plain(tools, "tools") or None  # templates test `tools is not none`: an empty list means none


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is a {type(message).__name__}; expected {{'role', 'content'}}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}")
    result = plain(message, where)
    result["content"] = _text_content(message, where)
    if result.get("tool_calls"):
        result["tool_calls"] = _decoded_arguments(result["tool_calls"], f"{where}.tool_calls")
    if result.get("reasoning_content") is None and isinstance(result.get("reasoning"), str):
        result["reasoning_content"] = result["reasoning"]  # the name that templates read
    return result


def _text_content(message: dict[str, Any], where: str) -> str | None:
    """Text, or text parts joined by newlines: most templates take one string."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{where} has no content; give text or a list of text parts (only tool_calls go without)")
    if not isinstance(content, list):
        raise ValueError(f"{where} has content of type {type(content).__name__}; expected text or text parts")
    return "\n".join(_part_text(part, f"{where}.content[{n}]") for n, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
    if kind == "'text'":
        raise ValueError(f"{where} has no text; give it as {{'type': 'text', 'text': ...}}")
    raise ValueError(f"{where} is {kind}; expected {{'type': 'text', 'text': ...}}; only text is supported")


def _decoded_arguments(calls: Any, where: str) -> list[dict[str, Any]]:
    """Templates print arguments as JSON, so the JSON text that clients send is decoded first."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where} must be a list of JSON objects")
    for n, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _decode_object(function["arguments"], f"{where}[{n}].function.arguments")
    return calls


def _decode_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not the text of a JSON object; send one, such as '{{}}'")
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy made of exact JSON types."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested more than {_MAX_DEPTH} levels deep; flatten it")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, where, depth + 1) for item in value]
    raise ValueError(f"{where} holds a {type(value).__name__}; expected JSON values only")
