"""Checks and plain copies of what users pass to a chat template.

Inputs: messages and tools as OpenAI clients send them. Outputs: fresh JSON values (a template never sees an
object of ours). It does not know any template: `message_shapes.py` gives each what it expects.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# A function may return nothing, and a model may answer nothing: only what somebody typed cannot be missing.
_MAY_BE_EMPTY = ("assistant", "tool", "function", "ipython")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is what most templates read
_MAX_DEPTH = 64


def plain_messages(messages: Any) -> list[Message]:
    """Fresh messages: content is text, a list of text parts, or absent; reasoning is under each of its names.

    Raises:
        ValueError: one line, for anything that is not a list of messages.
    """
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f"messages is {got}; expected a non-empty list of {{'role', 'content'}}")
    return [_plain_message(_dumped(message), f"messages[{n}]") for n, message in enumerate(messages)]


def plain_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("tools must be a list of function definitions (JSON objects), or None")
    return plain(tools, "tools") or None  # templates test `tools is not none`: an empty list means none


def _dumped(message: Any) -> Any:
    """An answer of the OpenAI client, put back into the history as it came, is a pydantic object."""
    dump = getattr(message, "model_dump", None)
    return dump() if callable(dump) else message


def _plain_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is a {type(message).__name__}; expected {{'role', 'content'}}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}")
    # A key without a value is no key: templates ask `is defined`, and print None.
    result = {key: item for key, item in plain(message, where).items() if item is not None}
    if "content" in result:
        _check_content(result["content"], where)
    elif role not in _MAY_BE_EMPTY:
        raise ValueError(f"{where} has no content; give text or a list of text parts")
    if calls := result.pop("tool_calls", None):
        _check_calls(calls, f"{where}.tool_calls")
        result["tool_calls"] = calls
    return _with_reasoning(result)


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise ValueError(f"{where} has content of type {type(content).__name__}; expected text or text parts")
    for n, part in enumerate(content):
        _check_part(part, f"{where}.content[{n}]")


def _check_part(part: Any, where: str) -> None:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return
    kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
    if kind == "'text'":
        raise ValueError(f"{where} has no text; give it as {{'type': 'text', 'text': ...}}")
    raise ValueError(f"{where} is {kind}; expected {{'type': 'text', 'text': ...}}; only text is supported")


def _check_calls(calls: Any, where: str) -> None:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{where} must be a list of JSON objects")
    for n, call in enumerate(calls):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{where}[{n}] has no function with a name; expected {{'function': {{'name', 'arguments'}}}}"
            )
        call.setdefault("type", "function")


def _with_reasoning(message: Message) -> Message:
    """The message with its reasoning under `reasoning_content` and `thinking` too, as transformers gives it."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


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
