"""Values that a model wrote without a type, read as the tool's JSON schema has them.

Inputs: a parameter's text and its schema. Output: JSON text.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

from jaxllm.parsing.json_text import loads

_MAX_OPTIONS = 64  # schemas may refer to themselves
_LITERALS = {"true": True, "false": False, "null": None, "none": None}


def parameter_schema(schema: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The schema of one parameter with local references followed; None where the function's says nothing of it."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    if found is None and isinstance(schema.get("additionalProperties"), Mapping):
        found = schema["additionalProperties"]
    return _resolved(found, schema) if isinstance(found, Mapping) else None


def types_of(schema: Mapping[str, Any] | None, root: Mapping[str, Any]) -> set[str]:
    """Names of a parameter's JSON types; none where anything is allowed, `string` where there is no schema."""
    if schema is None:
        return {"string"}
    found, waiting = set[str](), [schema]
    for _ in range(_MAX_OPTIONS):
        if not waiting:
            return found
        option = _resolved(waiting.pop(), root)
        own = _own_types(option)
        options = [o for key in ("anyOf", "oneOf", "allOf") for o in option.get(key) or () if isinstance(o, Mapping)]
        if not own and not options:
            break
        found |= own
        waiting += () if own else options
    return set()


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {k for k in kind if isinstance(k, str)}
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return {_type_name(value) for value in values}


def _type_name(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(8):
        where = schema.get("$ref")
        if not (isinstance(where, str) and where.startswith("#/")):
            break
        target: Any = root
        for step in where[2:].split("/"):
            target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        if not isinstance(target, Mapping):
            break
        schema = target
    return schema


def typed(text: str, types: set[str]) -> str:
    """JSON text of a parameter written as `text`: of one of `types` if it can be read so, else a string."""
    stripped = text.strip()
    if "string" in types and not (stripped in ("null", "None") and "null" in types):
        return json.dumps(text, ensure_ascii=False)
    value = _read(stripped)
    if value is None or (types and not _fits(value[0], types)):
        return json.dumps(text, ensure_ascii=False)
    return value[1]


def _fits(value: Any, types: set[str]) -> bool:
    name = _type_name(value)
    return name in types or (name in ("integer", "number") and bool(types & {"integer", "number"}))


def _read(text: str) -> tuple[Any, str] | None:
    """The value of JSON or of a Python literal, and its JSON text."""
    if text.lower() in _LITERALS:
        value = _LITERALS[text.lower()]
        return value, json.dumps(value)
    value = loads(text)
    if value is None:
        try:
            value = _literal(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    try:
        return value, json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\\d" and such in a model's text are no concern of this program's
        return ast.literal_eval(text.replace("\n", "\\n"))
