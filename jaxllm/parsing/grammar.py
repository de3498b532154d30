"""The grammar of an answer that must be calls, written as the model writes them.

Inputs: functions and the form of one call in a format. Output: Lark, as llguidance reads it. Special tokens stand in
it by their ids, since a grammar's texts match ordinary tokens alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from jaxllm.constraints.grammars import WHITE_SPACE
from jaxllm.constraints.json_schema import prepare
from jaxllm.parsing.schema_types import parameter_schema, types_of

Schema = Mapping[str, Any]
_ANY_TEXT = "/(?s:.*)/"
_SAYS_NOTHING = frozenset(("type", "title", "description", "default", "examples"))  # ... of how a text must look
MOST_CALLS = 16  # of one answer that must be calls


@final
class Rules:
    """The rules of one grammar.

    Args:
        special: texts of special tokens -> their ids.

    Attributes:
        ignored: keywords of JSON schemas that the grammar does not enforce.
    """

    def __init__(self, special: Mapping[str, int]):
        self.ignored: set[str] = set()
        self._special = special
        self._lines: list[str] = []
        self._splits = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or "(?!)")

    def rule(self, body: str, attributes: str = "") -> str:
        """A new rule; returns its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{attributes}: {body}")
        return name

    def literal(self, text: str) -> str:
        """This very text."""
        parts, at = [], 0
        for found in self._splits.finditer(text):
            parts += [_quoted(text[at : found.start()]), f"<[{self._special[found.group()]}]>"]
            at = found.end()
        return " ".join(part for part in [*parts, _quoted(text[at:])] if part)

    def json(self, schema: Schema) -> str:
        """A JSON value."""
        prepared, ignored = prepare(dict(schema))
        self.ignored.update(ignored)
        options = {"whitespace_pattern": WHITE_SPACE, "coerce_one_of": True}
        plain = prepared if isinstance(prepared, dict) else {}
        return self.rule(f"%json {json.dumps({**plain, 'x-guidance': options})}")

    def text(self, end: str) -> str:
        """Any text up to and with `end`."""
        if self._splits.search(end):
            return f"{self.rule(_ANY_TEXT)} {self.literal(end.strip())}"
        return self.rule(_ANY_TEXT, f"[suffix={json.dumps(end, ensure_ascii=False)}]")

    def grammar(self, start: str) -> str:
        """The whole of it."""
        return "\n".join([f"start: {start}", *self._lines])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How a format writes calls.

    Attributes:
        call: (rules, function's name, schema of its arguments) -> the body of a rule for one call.
        begin, between, end: around and between calls; without `between` there is only one in an answer.
        sign: what the chat templates of this variant contain, for formats that have several.
    """

    call: Callable[[Rules, str, Schema], str]
    begin: str = ""
    between: str | None = "\n"
    end: str = ""
    sign: str = ""


def calls_grammar(written: Written, functions: Mapping[str, Schema], rules: Rules, *, several: bool) -> str:
    """The body of a rule for one call of these functions, or several."""
    one = rules.rule(" | ".join(rules.rule(written.call(rules, name, schema)) for name, schema in functions.items()))
    parts = [rules.literal(written.begin), one]
    if several and written.between is not None:
        parts.append(f"({rules.literal(written.between)} {one}){{0,{MOST_CALLS - 1}}}")
    return " ".join(part for part in [*parts, rules.literal(written.end)] if part)


def named_object(before: str, after: str, key: str = "arguments") -> Callable[[Rules, str, Schema], str]:
    """`{"name": ..., "arguments": {...}}` between two texts."""

    def call(rules: Rules, name: str, schema: Schema) -> str:
        head, tail = f'{before}{{"name": {json.dumps(name)}, "{key}": ', f"}}{after}"
        return f"{rules.literal(head)} {rules.json(schema)} {rules.literal(tail)}"

    return call


def object_after(
    before: str, between: str, after: str = "", *, numbered: bool = False
) -> Callable[[Rules, str, Schema], str]:
    """The name, with a colon and a number if `numbered`, and the arguments' object, with texts around them."""

    def call(rules: Rules, name: str, schema: Schema) -> str:
        head = f"{rules.literal(f'{before}{name}:')} /[0-9]{{1,3}}/" if numbered else rules.literal(before + name)
        return f"{head} {rules.literal(between)} {rules.json(schema)} {rules.literal(after)}".rstrip()

    return call


def parameter_value(rules: Rules, schema: Schema, name: str, end: str) -> str:
    """One parameter's value as text, and what ends it."""
    own = parameter_schema(schema, name) or {}
    values = own.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return f"({' | '.join(json.dumps(value) for value in values)}) {rules.literal(end)}"
    if "string" in types_of(own, schema):
        rules.ignored.update(key for option in own.get("anyOf", [own]) for key in option if key not in _SAYS_NOTHING)
        return rules.text(end)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return f"{rules.json({**own, **definitions})} {rules.literal(end)}"
