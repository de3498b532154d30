"""A body that does not fit its schema -> one line for the client: what came, what is expected.

Input: pydantic's complaints and the body. Output: a message and the path of the field. Text of the client is not
repeated but for short names (it may be long, or a secret). It knows no route and no field but `_ELSEWHERE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN_CHARS = 50
_ELSEWHERE = {  # (what is missing, what is there instead)
    ("prompt", "messages"): "a conversation goes to /v1/chat/completions",
    ("messages", "prompt"): "a plain prompt goes to /v1/completions",
    ("messages", "input"): "input goes to /v1/responses or /v1/embeddings",
    ("input", "messages"): "messages go to /v1/chat/completions",
    ("input", "prompt"): "a prompt goes to /v1/completions; here it is called input",
}
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "of {max_length} characters or fewer",
    "string_too_short": "of {min_length} characters or more",
    "string_pattern_mismatch": "a match of the pattern {pattern}",
}


def explain(errors: Sequence[Any], body: Any) -> tuple[str, str | None]:
    """The message and the path of the field it is about (None where it is the body itself).

    A value that fits no branch of a union brings a complaint per branch: those that got furthest into it count.
    """
    found = [(*_walk(error["loc"], error["type"], body), error) for error in errors]
    field = found[0][0][:1]
    same = [one for one in found if one[0][:1] == field]
    path, value, error = max(same, key=lambda one: (_depth(one[0]), not _is_about_type(one[2])))
    alike = [e for p, _, e in same if p == path and _is_about_type(e) == _is_about_type(error)]
    where = ".".join(map(str, path))[:200]
    param = error["ctx"]["name"] if error["type"] == "not_understood" else where
    return _sentence(where, value, alike, body)[:1000], param or None


def _walk(loc: Sequence[Any], kind: str, body: Any) -> tuple[tuple[Any, ...], Any]:
    """The part of `loc` that exists in the body (pydantic adds names of union branches), and what is there."""
    path: tuple[Any, ...] = ()
    value = body
    for number, part in enumerate(loc[1:], 2):
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            path, value = (*path, part), value[part]
        elif kind == "missing" and number == len(loc):
            path = (*path, part)
        elif part == "[key]" and path:  # the complaint is about the name of what was just passed
            value = path[-1]
    return path, value


def _depth(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return len(path), *(part for part in path if isinstance(part, int))


def _is_about_type(error: Any) -> bool:
    return error["type"].endswith("_type") or error["type"] == "literal_error"


def _sentence(where: str, value: Any, errors: Sequence[Any], body: Any) -> str:
    first, name = errors[0], where or "the body"
    kind, context = first["type"], first.get("ctx") or {}
    if kind == "missing":
        if not where:
            return "the body is empty; send a JSON object"
        given = body if isinstance(body, dict) else {}
        hints = [text for (missing, other), text in _ELSEWHERE.items() if missing == where and other in given]
        return f"{name} is missing; " + (hints[0] if hints else "add it")
    if kind in ("too_short", "too_long"):
        bound = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return f"{name} has {len(value)} entries; it must have {bound}"
    if kind == "string_unicode":
        return f"{name} has a lone surrogate; send valid Unicode text"
    if kind == "not_understood":
        return first["msg"]
    wanted = dict.fromkeys(_expected(error) for error in errors)
    if isinstance(value, float) and value.is_integer() and "a whole number" in wanted:
        return f"{name} is {value}; write it without a decimal point"
    return f"{name} is {_shown(value, kind)}; it must be {' or '.join(wanted)}"


def _expected(error: Any) -> str:
    text, context = _EXPECTED.get(error["type"]), error.get("ctx") or {}
    plain = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    return text.format(**plain) if text else error["msg"].removeprefix("Input should be ")


def _shown(value: Any, kind: str) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return f"{value}" if abs(value) < 1e20 or isinstance(value, float) else "a huge number"
    if isinstance(value, str):
        named = kind in ("literal_error", "string_pattern_mismatch") and len(value) <= _SHOWN_CHARS
        return repr(value) if named else "a string" if value else "an empty string"
    return "a list" if isinstance(value, list) else "an object"
