"""What a configuration class says of its own fields: types to check values by, documentation to make flags from.

A field is written once: its annotation is the type of its flag, its default the flag's default, and its entry in the
class's `Attributes:` section the flag's help. Knows nothing of any configuration in particular.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_ENTRY = re.compile(r"^ {8}(\w+)(?: \(([^)]+)\))?: (.*)$")
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True, slots=True)
class FieldDoc:
    """One field.

    Attributes:
        kind: the type of its values, None left out.
        choices: the only values, where its type lists them.
        default: what it is when nobody says anything.
        unit: what its number counts, in capitals, for a flag's usage text; None for none.
        help: its documentation.
    """

    kind: Any
    choices: tuple[Any, ...] | None
    default: Any
    unit: str | None
    help: str


@functools.cache
def describe(cls: type) -> dict[str, FieldDoc]:
    """Every field of a dataclass, from its annotation, default and `Attributes:` entry, in order."""
    hints, docs = typing.get_type_hints(cls), _attributes(cls.__doc__ or "")
    found = {}
    for field in dataclasses.fields(cls):
        kind = _without_none(hints[field.name])
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
        unit, text = docs.get(field.name, (None, ""))
        found[field.name] = FieldDoc(type(choices[0]) if choices else kind, choices, field.default, unit, text)
    return found


def check_types(config: Any) -> None:
    """Raise ValueError for the first field whose value is of another type than its annotation says."""
    hints = describe(type(config))
    for name, doc in hints.items():
        value = getattr(config, name)
        if value is None and (doc.default is None or _allows_none(type(config), name)):
            continue
        if doc.choices:
            if not isinstance(value, str) or value not in doc.choices:
                raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(doc.choices)}")
        elif not _fits(value, doc.kind):
            raise ValueError(f"{name}={value!r}; it must be {_WORDS.get(doc.kind, 'a table')}")


def _fits(value: object, kind: Any) -> bool:
    kind = typing.get_origin(kind) or kind
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (Mapping, dict):
        return isinstance(value, Mapping)
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str)
    return not isinstance(kind, type) or isinstance(value, kind)


@functools.cache
def _nullable(cls: type) -> frozenset[str]:
    hints = typing.get_type_hints(cls)
    return frozenset(name for name, hint in hints.items() if type(None) in typing.get_args(hint))


def _allows_none(cls: type, name: str) -> bool:
    return name in _nullable(cls)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007  (kinds are values here)


def _attributes(doc: str) -> dict[str, tuple[str | None, str]]:
    """Unit and text of each entry of an `Attributes:` section."""
    _, _, section = doc.partition("Attributes:\n")
    entries: dict[str, tuple[str | None, str]] = {}
    name = None
    for line in section.splitlines():
        if match := _ENTRY.match(line):
            name = match[1]
            entries[name] = (match[2], match[3])
        elif name and line.startswith(" " * 12):
            unit, text = entries[name]
            entries[name] = (unit, f"{text} {line.strip()}")
        else:
            name = None
    return entries
