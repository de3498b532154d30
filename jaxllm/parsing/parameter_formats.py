"""Formats that write each argument between tags of its own: Qwen3-Coder, GLM-4.5, MiniMax-M2, Seed-OSS, DeepSeek-V3.2.

Texts stream as they come; other values are read whole, as the type that the tool's schema gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, NewId, Tools
from jaxllm.parsing.formats import CallFormat
from jaxllm.parsing.grammar import Rules, Written, parameter_value
from jaxllm.parsing.json_text import named_arguments
from jaxllm.parsing.schema_types import parameter_schema, typed, types_of
from jaxllm.parsing.source import Source, Steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Tags:
    """The markers of such a format.

    Attributes:
        begin, end: around one or several calls; an empty `end` where a call's own end is all there is.
        call, call_end: around one call; `call` is empty where `begin` is all there is.
        name_end: between the name and the parameters; empty where a line or a tag ends it.
        key, key_ends: around a parameter's name. A `key_ends` may say whether the value is a string.
        value, value_end: around its value.
        on_lines: values stand on lines of their own.
        apart: each call stands in a block of its own.
    """

    begin: str
    end: str
    call: str
    call_end: str
    name_end: str
    key: str
    key_ends: Mapping[str, bool | None]
    value: str = ""
    value_end: str
    on_lines: bool = False
    apart: bool = False

    def format(self) -> CallFormat:
        """The format so marked."""
        own = (self.begin, self.end, self.call, self.call_end, self.key, *self.key_ends, self.value, self.value_end)
        opens = tuple(m for m in (self.begin, self.call) if m)
        return CallFormat(
            opens=opens, block=self._block, markers=tuple(m for m in own if m), written=(self._written(),)
        )

    def _written(self) -> Written:
        if self.apart:
            return Written(call=self._writes)
        return Written(begin=f"{self.begin}\n", call=self._writes, end=f"\n{self.end}")

    def _writes(self, rules: Rules, name: str, schema: Mapping[str, Any]) -> str:
        """The body of a rule for one call: its parameters in the schema's order, those not required or not."""
        gap, parts = "\n" if self.apart and self.call else "", []
        properties = schema.get("properties")
        for key in properties if isinstance(properties, Mapping) else ():
            rule = rules.rule(f"{rules.literal(self._before(key, schema))} {self._value_of(rules, key, schema)}")
            parts.append(rule if key in (schema.get("required") or ()) else f"{rule}?")
        head = f"{self.begin}{gap}" if self.apart else ""
        tail = f"{self.call_end}{gap}{self.end}" if self.apart else self.call_end
        return " ".join([rules.literal(f"{head}{self.call}{name}{self.name_end}\n"), *parts, rules.literal(tail)])

    def _before(self, key: str, schema: Mapping[str, Any]) -> str:
        is_text = "string" in types_of(parameter_schema(schema, key), schema)
        key_end = next(end for end, says in self.key_ends.items() if says in (None, is_text))
        return f"{self.key}{key}{key_end}" + (f"\n{self.value}" if self.value else "\n" if self.on_lines else "")

    def _value_of(self, rules: Rules, key: str, schema: Mapping[str, Any]) -> str:
        return parameter_value(rules, schema, key, ("\n" if self.on_lines else "") + self.value_end + "\n")

    def _block(self, src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
        called, opened = False, not self.call or opened_by == self.call
        while True:
            mark = src.pos
            yield from src.spaces()
            if called and self.end and (yield from src.take(self.end)):
                return True
            if not opened and not (self.call and (yield from src.take(self.call))):
                src.pos = mark
                return called
            if not (yield from self._call(src, tools, new_id)):
                src.pos = mark
                return called
            called, opened = True, False

    def _call(self, src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
        yield from src.spaces()
        name = yield from src.take(*tools)
        if not name or not (yield from self._ends_name(src)):
            return False
        if self.call and (yield from named_arguments(src, name, new_id())):  # Llama's and Functionary's way
            yield from src.spaces()
            yield from src.take(self.call_end)
            return True
        yield CallStart(name, new_id())
        written = 0
        while True:
            yield from src.spaces()
            if (yield from src.take(self.call_end)):
                break
            if not (yield from src.take(self.key)):
                if src.ended and not (yield from src.next_char()):
                    yield CallEnd(complete=False)
                    return True
                break
            if not (yield from self._parameter(src, tools[name], "{" if not written else ", ")):
                yield CallEnd(complete=False)
                return True
            written += 1
        yield CallArguments("}" if written else "{}")
        yield CallEnd()
        return True

    def _ends_name(self, src: Source) -> Steps[bool]:
        if self.name_end:
            return bool((yield from src.take(self.name_end)))
        mark = src.pos
        gap = yield from src.spaces()
        if "\n" in gap:
            return True
        found = yield from src.take(self.key, self.call_end)
        src.pos = mark
        return bool(found)

    def _parameter(self, src: Source, schema: Mapping[str, Any], before: str) -> Steps[bool]:
        """Read one parameter behind its first marker; false where the text ends in it."""
        key, key_end = yield from src.capture(*self.key_ends)
        if not key_end:
            return False
        if self.value:
            yield from src.spaces()
            if not (yield from src.take(self.value)):
                return False
        yield CallArguments(f"{before}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        is_text = self.key_ends[key_end]
        types = types_of(parameter_schema(schema, key.strip()), schema)
        if is_text is not None:
            types = {"string"} if is_text else types - {"string"}
        return (yield from self._value(src, types))

    def _value(self, src: Source, types: set[str]) -> Steps[bool]:
        if self.on_lines:
            yield from src.take("\n")
        ends = (f"\n{self.value_end}", self.value_end) if self.on_lines else (self.value_end,)
        if types == {"string"}:
            yield CallArguments('"')
            found = yield from src.until(ends, _escaped)
            if found:
                yield CallArguments('"')
            return bool(found)
        text, found = yield from src.capture(*ends)
        if found:
            yield CallArguments(typed(text, types))
        return bool(found)


def _escaped(text: str) -> CallArguments:
    return CallArguments(json.dumps(text, ensure_ascii=False)[1:-1])


QWEN3_CODER = Tags(
    begin="<tool_call>",
    end="</tool_call>",
    call="<function=",
    call_end="</function>",
    name_end=">",
    key="<parameter=",
    key_ends={">": None},
    value_end="</parameter>",
    on_lines=True,
    apart=True,
).format()
SEED = Tags(
    begin="<seed:tool_call>",
    end="</seed:tool_call>",
    call="<function=",
    call_end="</function>",
    name_end=">",
    key="<parameter=",
    key_ends={">": None},
    value_end="</parameter>",
    apart=True,
).format()
MINIMAX_M2 = Tags(
    begin="<minimax:tool_call>",
    end="</minimax:tool_call>",
    call='<invoke name="',
    call_end="</invoke>",
    name_end='">',
    key='<parameter name="',
    key_ends={'">': None},
    value_end="</parameter>",
).format()
GLM = Tags(
    begin="<tool_call>",
    end="",
    call="",
    call_end="</tool_call>",
    name_end="",
    key="<arg_key>",
    key_ends={"</arg_key>": None},
    value="<arg_value>",
    value_end="</arg_value>",
    apart=True,
).format()
DEEPSEEK_V32 = Tags(
    begin="<｜DSML｜function_calls>",
    end="</｜DSML｜function_calls>",
    call='<｜DSML｜invoke name="',
    call_end="</｜DSML｜invoke>",
    name_end='">',
    key='<｜DSML｜parameter name="',
    key_ends={'" string="true">': True, '" string="false">': False},
    value_end="</｜DSML｜parameter>",
).format()
