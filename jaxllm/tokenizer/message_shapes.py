"""Messages as OpenAI clients send them -> messages as one template expects them.

Inputs: plain messages and the template's `Dialect`. Outputs: messages, each with the index of the one it came from.
Where a template takes what was sent, that is what it gets: nothing is changed for its own sake.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.tokenizer.messages import Message
from jaxllm.tokenizer.template_dialect import Absence, Dialect

Shaped = list[tuple[int, Message]]
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_RESULTS = ("tool", "function", "ipython")


def shaped(messages: Sequence[Message], dialect: Dialect) -> Shaped:
    """The conversation in the template's own spelling, and which message each entry came from."""
    result = [(n, _message(message, dialect)) for n, message in enumerate(messages)]
    has_calls = any("tool_calls" in message for message in messages)
    has_results = any(message["role"] in _RESULTS for message in messages)
    if has_calls and max(len(m.get("tool_calls", ())) for m in messages) > 1 and dialect.takes_one_call:
        result = list(_one_call_each(result, dialect))
    if has_results and dialect.wants_result_names:
        _name_results(result)
    if (has_calls or has_results) and dialect.wants_short_ids:
        _shorten_ids(result)
    return result


def _message(message: Message, dialect: Dialect) -> Message:
    result = dict(message)
    if result["role"] == "developer" and not dialect.knows_developer:
        result["role"] = "system"
    if "reasoning_content" in result and dialect.reads_only_reasoning:
        result.setdefault("reasoning", result["reasoning_content"])
    if "tool_calls" in result:
        return _with_calls(result, dialect)
    if "content" not in result:
        return _without_content(result, dialect.empty_answer if result["role"] == "assistant" else "empty")
    result["content"] = _content(result["content"], result["role"], dialect)
    return result


def _content(content: str | list[Message], role: str, dialect: Dialect) -> str | list[Message]:
    """Text for templates that take text, parts for those that show nothing else."""
    if isinstance(content, list):
        if content and dialect.reads_parts(role):
            return content
        content = "\n".join(part["text"] for part in content)
    return content if dialect.reads_text(role) else [{"type": "text", "text": content}]


def _with_calls(message: Message, dialect: Dialect) -> Message:
    shape = dialect.call_shape("empty" if message.get("content") == "" else "absent")
    calls = [_call(call, shape.text_arguments, dialect) for call in message["tool_calls"]]
    result = {**message, "tool_calls": calls}
    if content := message.get("content"):
        result["content"] = _content(content, "assistant", dialect)
    else:
        result = _without_content(result, shape.content)
    if content and "thinking" in message and dialect.takes_reasoning_or_content:
        return _reasoning_only(result)
    return result


def _without_content(message: Message, absence: Absence) -> Message:
    result = {key: item for key, item in message.items() if key != "content"}
    if absence != "absent":
        result["content"] = "" if absence == "empty" else None
    return result


def _reasoning_only(message: Message) -> Message:
    """What was said beside a call, as the end of the reasoning that led to it."""
    content = message.pop("content")
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    both = f"{message['thinking']}\n\n{text}"
    return {**message, "thinking": both, "reasoning_content": both}


def _call(call: dict[str, Any], as_text: bool, dialect: Dialect) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"), as_text, dialect)}}


def _arguments(given: Any, as_text: bool, dialect: Dialect) -> Any:
    if isinstance(given, dict):
        return json.dumps(given, ensure_ascii=False) if as_text else given
    text = given if isinstance(given, str) else "" if given is None else json.dumps(given, ensure_ascii=False)
    decoded = _decoded(text)
    if as_text:
        return text or "{}"
    if decoded is not None:
        return decoded
    # What a model wrote wrongly stays in its history, or it could not be told what was wrong.
    return text if dialect.takes_raw_arguments else {"arguments": text}


def _decoded(text: str) -> dict[str, Any] | None:
    if text.strip() in ("", "null"):
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _one_call_each(messages: Shaped, dialect: Dialect) -> Iterator[tuple[int, Message]]:
    """Each call in a message of its own, its result behind it."""
    waiting: Shaped = []
    rest = list(messages)
    while rest:
        origin, message = rest.pop(0)
        calls = message.get("tool_calls", [])
        if len(calls) < 2:
            yield origin, message
            continue
        while rest and rest[0][1]["role"] in _RESULTS:
            waiting.append(rest.pop(0))
        for n, call in enumerate(calls):
            later = {"role": "assistant"} if n else message
            absence = dialect.call_shape("absent").content
            yield origin, {**(_without_content(later, absence) if n else later), "tool_calls": [call]}
            mine = [entry for entry in waiting if entry[1].get("tool_call_id") == call.get("id")]
            yield from mine
            waiting = [entry for entry in waiting if entry not in mine]
        yield from waiting
        waiting = []


def _name_results(messages: Shaped) -> None:
    names: dict[Any, str] = {}
    for _, message in messages:
        names |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls", [])}
        if message["role"] in _RESULTS:
            message.setdefault("name", names.get(message.get("tool_call_id"), "tool"))


def _shorten_ids(messages: Shaped) -> None:
    """Ids of nine letters and digits: those that fit stay, others become a digest of themselves."""
    for _, message in messages:
        for n, call in enumerate(message.get("tool_calls", [])):
            call["id"] = _short(call.get("id") or str(n))
        if message["role"] in _RESULTS:
            message["tool_call_id"] = _short(message.get("tool_call_id") or "0")


def _short(call_id: str) -> str:
    return call_id if _NINE.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]
