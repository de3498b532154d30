"""What types cannot say of a request: fields that need or exclude each other, names that are not understood.

The first kind becomes JSON schema (for people, generated clients and fuzzers; the server checks it where it uses the
fields), the second is checked here. Knows no route.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ConfigDict
from pydantic_core import PydanticCustomError

from jaxllm.schema.other_servers import OTHERS

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
_LIKENESS = 0.85


def rules(*parts: Schema) -> ConfigDict:
    """A model's configuration with schemas that must hold beside its own."""
    return ConfigDict(json_schema_extra={"allOf": list(parts)})


def either(*choices: Schema) -> Schema:
    """At least one of them holds."""
    return {"anyOf": list(choices)}


def absent(*names: str) -> Schema:
    """These fields are null or left out."""
    return {"properties": dict.fromkeys(names, NULL)}


def given(**fields: Schema) -> Schema:
    """These fields are there and as said."""
    return {"required": list(fields), "properties": fields}


def only(**fields: Schema) -> Schema:
    """These fields are as said or left out."""
    return {"properties": fields}


def exactly_one(**fields: Schema) -> Schema:
    """One of these fields is there and as said, the others are null or left out."""
    return {
        "oneOf": [
            {"required": [name], "properties": {name: field} | dict.fromkeys(set(fields) - {name}, NULL)}
            for name, field in fields.items()
        ]
    }


def check_names(body: Any, known: Iterable[str]) -> Any:
    """`body` itself. Raises where a field is misspelt, or another server's that would change the answer."""
    known = set(known)
    if isinstance(body, dict):
        for name, value in body.items():
            if name not in known and value is not None and (message := _complaint(name, value, known, set(body))):
                raise PydanticCustomError("not_understood", "{name} {message}", {"name": name[:50], "message": message})
    return body


def _complaint(name: str, value: Any, known: set[str], given: set[str]) -> str | None:
    """What is wrong with a field that is not known here; None lets it pass."""
    if (other := OTHERS.get(name)) is not None:
        return None if other.asks_for_nothing(value) else other.message(known)
    near = sorted(known - given)
    close = difflib.get_close_matches(name[:50], near, n=1, cutoff=_LIKENESS) if len(name) > 3 else []
    return f"is not a field here; use {close[0]}" if close else None
