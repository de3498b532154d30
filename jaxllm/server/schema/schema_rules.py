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

Schema = dict[str, Any]
NULL: Schema = {"type": "null"}
_INSTEAD = {  # fields of other servers that change the answer, so that ignoring them would be wrong
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "functions": "tools",
    "function_call": "tool_choice",
    "max_new_tokens": "max_tokens",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_tokens",
    "prompt_logprobs": "echo with logprobs",
}
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
    """`body` itself. Raises where a field is misspelt, or another server's name for what is called otherwise here."""
    known = set(known)
    if isinstance(body, dict):
        for name in [name for name, value in body.items() if name not in known and value is not None]:
            if (instead := _instead(name, known - set(body))) is not None:
                raise PydanticCustomError("not_understood", "{name} is not a field here; use {instead}",
                                          {"name": name[:50], "instead": instead})  # fmt: skip
    return body


def _instead(name: str, known: set[str]) -> str | None:
    instead = _INSTEAD.get(name)
    if instead is not None and instead.partition(".")[0].partition(" ")[0] in known:
        return instead
    close = difflib.get_close_matches(name[:50], sorted(known), n=1, cutoff=_LIKENESS) if len(name) > 3 else []
    return close[0] if close else None
