"""A JSON schema as people write it -> one that the grammar compiler takes, and the keywords that nothing enforces.

Inputs: any JSON schema. Outputs: an equivalent one in which objects are closed (a model that may invent keys does),
keywords that can be said otherwise are said otherwise (`schema_rewrites.py`), and the rest is left out and named. It
knows nothing of tokens or of the compiler but for which keywords, formats and patterns that understands.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, final
from urllib.parse import unquote

from jaxllm.constraints import schema_rewrites as rewrites

Schema = Any  # bool or a JSON object
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = ("items", "additionalProperties", "additionalItems")
_COMBINED = ("allOf", "anyOf", "oneOf")
_NOT_ENFORCED = (
    "uniqueItems not if then else contains minContains maxContains propertyNames dependentRequired dependentSchemas "
    "dependencies unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef".split()
)
_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split())
_MAX_DEPTH = 64
_MAX_NODES = 20_000


def prepare(schema: str | dict[str, Any]) -> tuple[Schema, tuple[str, ...]]:
    """The schema to compile, and the keywords of it that are ignored, each once.

    Raises:
        ValueError: no JSON, nested too deeply, or a `$ref` that leads nowhere.
    """
    root = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(root, dict | bool):
        raise ValueError(f"it is {type(root).__name__}; a schema is an object, true or false")
    work = _Preparation(root)
    return work.walk(root), tuple(work.ignored)


@final
class _Preparation:
    """One schema's way through the rewriting."""

    def __init__(self, root: Schema):
        self.root = root
        self.ignored: dict[str, None] = {}
        self._num_nodes = 0
        self._inlined: list[str] = []

    def walk(self, schema: Schema, depth: int = 0, *, leave_open: bool = False) -> Schema:
        """A rewritten copy. With `leave_open` it is part of a larger object, which is closed as a whole."""
        if not isinstance(schema, dict):
            return schema
        self._count(depth)
        if isinstance(ref := schema.get("$ref"), str):
            target = self.resolve(ref)
            if leave_open and ref not in self._inlined:
                return self._inline(ref, target, depth)
        parts = _is_combined(schema)
        out = {key: self._value(key, value, depth, parts or leave_open) for key, value in schema.items()}
        self._rewrite(out)
        if not leave_open:
            self._close(schema, out, parts)
        return out

    def _count(self, depth: int) -> None:
        self._num_nodes += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep; flatten it")
        if self._num_nodes > _MAX_NODES:
            raise ValueError(f"it has more than {_MAX_NODES} parts; split it")

    def _inline(self, ref: str, target: Schema, depth: int) -> Schema:
        self._inlined.append(ref)
        try:
            return self.walk(target, depth + 1, leave_open=True)
        finally:
            self._inlined.pop()

    def _value(self, key: str, value: Any, depth: int, leave_open: bool) -> Any:
        """The value of one keyword; only schemas within it are walked."""
        if key in _MAPS and isinstance(value, dict):
            return {name: self.walk(part, depth + 1) for name, part in value.items()}
        if key in _LISTS and isinstance(value, list):
            leave_open = leave_open and key in _COMBINED
            return [self.walk(part, depth + 1, leave_open=leave_open) for part in value]
        if key in _ONES:
            if isinstance(value, list):  # a tuple, as drafts before 2020-12 write it
                return [self.walk(part, depth + 1) for part in value]
            return self.walk(value, depth + 1)
        return value

    def _rewrite(self, out: dict[str, Any]) -> None:
        """Say otherwise what can be said otherwise, and leave out what cannot be enforced."""
        rewrites.exclude_values(out)
        rewrites.enumerate_unique_items(out, self.deref)
        rewrites.name_properties(out)
        rewrites.bound_integers(out)
        rewrites.bound_numbers(out)
        if isinstance(out.get("unevaluatedProperties"), bool):  # closed objects have no such keys
            out.pop("unevaluatedProperties", None)
        for name in _NOT_ENFORCED:
            if out.pop(name, None) not in (False, None) and name not in ("then", "else"):
                self._ignore(name)
        self._drop_format(out)
        self._drop_patterns(out)

    def _ignore(self, keyword: str) -> None:
        self.ignored[keyword] = None

    def _drop_format(self, out: dict[str, Any]) -> None:
        given = out.get("format")
        if given is None or given in _FORMATS:
            return
        del out["format"]
        kinds = out.get("type", "string")
        if "string" in (kinds if isinstance(kinds, list) else [kinds]):  # elsewhere a format says nothing
            self._ignore(f"format {str(given)[:40]!r}")

    def _drop_patterns(self, out: dict[str, Any]) -> None:
        if isinstance(pattern := out.get("pattern"), str) and not _is_supported(pattern):
            del out["pattern"]
            self._ignore(f"pattern {pattern[:40]!r}")
        named = out.get("patternProperties")
        for pattern in [p for p in named if not _is_supported(p)] if isinstance(named, dict) else ():
            del out["patternProperties"][pattern]
            self._ignore(f"patternProperties {pattern[:40]!r}")

    def _close(self, schema: dict[str, Any], out: dict[str, Any], combined: bool) -> None:
        """Allow no keys but those it names, unless it says that others may come."""
        if combined:
            parts = list(self._parts(schema))
            names = dict.fromkeys(name for part in parts for name in part.get("properties", ()))
            if names and not any("additionalProperties" in part or "patternProperties" in part for part in parts):
                everything = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
                out["allOf"] = [*out.get("allOf", ()), everything]
        elif isinstance(properties := out.get("properties"), dict) and "additionalProperties" not in out:
            for name in out.get("required", ()):
                properties.setdefault(name, True)
            out.setdefault("type", "object")
            least = out.get("minProperties", 0)
            out["additionalProperties"] = isinstance(least, int) and least > len(properties)

    def _parts(self, schema: Schema, depth: int = 0) -> Iterator[dict[str, Any]]:
        """A combined schema and everything that it is combined of."""
        schema = self.deref(schema)
        if not isinstance(schema, dict):
            return
        self._count(depth)
        yield schema
        for key in _COMBINED:
            for part in schema.get(key, ()):
                yield from self._parts(part, depth + 1)

    def deref(self, schema: Schema) -> Schema:
        """What a `$ref` stands for, else the schema itself."""
        ref = schema.get("$ref") if isinstance(schema, dict) else None
        return self.resolve(ref) if isinstance(ref, str) else schema

    def resolve(self, ref: str) -> Schema:
        """The schema that a `$ref`, and whatever that refers to in turn, points to."""
        seen: list[str] = []
        while True:
            if ref in seen:
                raise ValueError(f"$ref {ref[:80]!r} refers to itself; let it name a schema")
            seen.append(ref)
            target = _look_up(self.root, ref)
            following = target.get("$ref") if isinstance(target, dict) else None
            if not isinstance(following, str):
                return target
            ref = following


def _is_combined(schema: dict[str, Any]) -> bool:
    """Whether one object is described in several places."""
    branches = [key for key in _COMBINED if isinstance(schema.get(key), list)]
    return bool(branches) and ("properties" in schema or len(branches) > 1 or len(schema.get("allOf", ())) > 1)


def _look_up(root: Schema, ref: str) -> Schema:
    if not ref.startswith("#"):
        raise ValueError(f"$ref {ref[:80]!r} points outside of the schema; put what it names into $defs")
    if ref != "#" and not ref.startswith("#/"):
        raise ValueError(f"$ref {ref[:80]!r} names an anchor; write the path, such as '#/$defs/Name'")
    part = root
    for name in unquote(ref[1:]).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and name.isdigit() and int(name) < len(part):
            part = part[int(name)]
        elif isinstance(part, dict) and name in part:
            part = part[name]
        else:
            raise ValueError(f"$ref {ref[:80]!r} points to nothing in the schema; correct it")
    if not isinstance(part, dict | bool):
        raise ValueError(f"$ref {ref[:80]!r} points to something that is no schema; correct it")
    return part


@functools.lru_cache(1024)
def _is_supported(pattern: str) -> bool:
    """Whether the compiler takes it. Raises ValueError where it is no regular expression at all."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern})
    if not (problem := LLMatcher.validate_grammar(grammar)):
        return True
    if "look" in problem or "backreference" in problem:
        return False
    raise ValueError(f"pattern {pattern[:80]!r} is not a regular expression: {problem.split('error: ')[-1][:120]}")
