"""Keywords of JSON schema that the grammar compiler lacks, in terms of those that it has.

Each function changes one schema object (its parts are done already) where that keeps its meaning, and leaves it alone
elsewhere. Source: JSON Schema 2020-12, validation vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

_MOST_VALUES = 256  # integers written out in place of a range
_MOST_UNIQUE = 4  # values whose orders are all written out: 65 arrays
_LISTED = frozenset(("enum", "const", "multipleOf"))
_LARGEST, _FINEST = 10**15, 1e-9  # of numbers that are not bounded otherwise
_INT32 = 2**31
_INT64 = 10**18  # the most that fits, in digits: the compiler counts in 64 bits itself


def exclude_values(schema: dict[str, Any]) -> None:
    """`not` of some values or of a type, where what remains can be listed."""
    unwanted = schema.get("not")
    if not isinstance(unwanted, dict) or len(unwanted) != 1:
        return
    ((keyword, value),) = unwanted.items()
    if keyword == "type":
        _exclude_type(schema, value)
    elif keyword in ("const", "enum"):
        excluded, known = [value] if keyword == "const" else value, possible_values(schema)
        if known is not None and isinstance(excluded, list):
            schema["enum"] = [one for one in known if not any(_same(one, other) for other in excluded)]
            for name in ("not", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                schema.pop(name, None)


def _exclude_type(schema: dict[str, Any], unwanted: Any) -> None:
    kinds = schema.get("type")
    if isinstance(kinds, str):
        kinds = [kinds]
    if isinstance(kinds, list) and isinstance(unwanted, str) and (left := [k for k in kinds if k != unwanted]):
        schema["type"] = left
        del schema["not"]


def possible_values(schema: Any) -> list[Any] | None:
    """Every value that fits, where the schema lists them or is a short range of integers."""
    if not isinstance(schema, dict):
        return None
    if isinstance(listed := schema.get("enum"), list):
        return listed
    if "const" in schema:
        return [schema["const"]]
    if schema.get("type") == "boolean":
        return [False, True]
    if schema.get("type") != "integer" or "multipleOf" in schema:
        return None
    low = _bound(schema, "minimum", "exclusiveMinimum", 1)
    high = _bound(schema, "maximum", "exclusiveMaximum", -1)
    if low is None or high is None or high - low >= _MOST_VALUES:
        return None
    return list(range(low, high + 1))


def _bound(schema: dict[str, Any], inclusive: str, exclusive: str, step: int) -> int | None:
    if type(value := schema.get(inclusive)) is int and exclusive not in schema:
        return value
    if type(value := schema.get(exclusive)) is int and inclusive not in schema:
        return value + step
    return None


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON, where true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def enumerate_unique_items(schema: dict[str, Any], deref: Callable[[Any], Any]) -> None:
    """`uniqueItems` of few possible values: every array there can be; of more: at least no longer ones."""
    if schema.get("uniqueItems") is not True or "prefixItems" in schema:
        return
    values = possible_values(deref(schema.get("items")))
    if values is None:
        return
    least, most = schema.get("minItems", 0), min(schema.get("maxItems", len(values)), len(values))
    if len(values) > _MOST_UNIQUE or not set(schema) <= _OF_ARRAYS:
        schema["maxItems"] = most
        return
    arrays = [list(order) for size in range(least, most + 1) for order in itertools.permutations(values, size)]
    for name in ("type", "items", "uniqueItems", "minItems", "maxItems"):
        schema.pop(name, None)
    schema["enum"] = arrays


_OF_ARRAYS = frozenset("type items uniqueItems minItems maxItems title description default examples".split())


def name_properties(schema: dict[str, Any]) -> None:
    """`propertyNames` of a pattern or a list, as the properties that it allows."""
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or "properties" in schema or "patternProperties" in schema:
        return
    value = schema.get("additionalProperties", True)
    if isinstance(pattern := names.get("pattern"), str) and set(names) <= {"pattern", "type", "title"}:
        schema["patternProperties"] = {pattern: value}
    elif (listed := possible_values(names)) is not None and all(isinstance(one, str) for one in listed):
        schema["properties"] = dict.fromkeys(listed, value)
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def bound_integers(schema: dict[str, Any]) -> None:
    """OpenAPI's `int32` and `int64` as the bounds that they mean; other integers get 64 bits, so that they end."""
    if schema.get("type") != "integer" or _LISTED & set(schema):
        return
    size = _INT32 if schema.pop("format", None) == "int32" else _INT64
    low, high = (_number(schema, f"{end}imum", f"exclusive{end.title()}imum") for end in ("min", "max"))
    if low is None and (high is None or high > -size):
        schema["minimum"] = -size
    if high is None and (low is None or low < size - 1):
        schema["maximum"] = size - 1


def bound_numbers(schema: dict[str, Any]) -> None:
    """Numbers get so many digits before and behind the point, so that they end; written without an exponent."""
    kinds = schema.get("type")
    if "number" not in (kinds if isinstance(kinds, list) else [kinds]) or _LISTED & set(schema):
        return
    low, high = (_number(schema, f"{end}imum", f"exclusive{end.title()}imum") for end in ("min", "max"))
    if any(bound and not _FINEST * 1000 <= abs(bound) < _LARGEST for bound in (low, high)):
        return
    schema["multipleOf"] = _FINEST
    if low is None:
        schema["minimum"] = -_LARGEST
    if high is None:
        schema["maximum"] = _LARGEST


def _number(schema: dict[str, Any], *names: str) -> float | None:
    return next((value for name in names if isinstance(value := schema.get(name), int | float)), None)
