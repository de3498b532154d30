"""How one model's answers are read and constrained: the formats of its thoughts and of its calls.

The command line, the routes and tests choose here, by name or by what the chat template contains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.parsing.events import Parser, Tools
from jaxllm.parsing.formats import NO_CALLS, NO_THOUGHTS, CallFormat, Thinking, read_answer
from jaxllm.parsing.grammar import Rules, Schema, Written, calls_grammar
from jaxllm.parsing.json_text import loads
from jaxllm.parsing.reading import Reading
from jaxllm.parsing.source import Source, Steps
from jaxllm.parsing.table import CALL_FORMATS, CALL_SIGNS, THINKING, THINKING_SIGNS

AUTO, NONE = "auto", "none"


def call_parser_names() -> list[str]:
    """What `--tool-call-parser` takes."""
    return [AUTO, NONE, *sorted(CALL_FORMATS)]


def reasoning_parser_names() -> list[str]:
    """What `--reasoning-parser` takes."""
    return [AUTO, NONE, *sorted(THINKING)]


@final
@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one model's answers are read and constrained.

    Attributes:
        thinking: how it marks thoughts.
        calls: how it writes calls.
        written: how it must write a call that is asked for; None where its own way is not known for certain.
    """

    thinking: Thinking
    calls: CallFormat
    written: Written | None = None

    @classmethod
    def chosen(cls, template: str | None, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO) -> AnswerFormat:
        """By name, or by what the chat template contains where the name is `auto`.

        Raises:
            ValueError: a name that does not exist.
        """
        _check("--tool-call-parser", tool_call_parser, call_parser_names())
        _check("--reasoning-parser", reasoning_parser, reasoning_parser_names())
        named = _by_signs(template, CALL_SIGNS) if tool_call_parser == AUTO else tool_call_parser
        thinking = _by_signs(template, THINKING_SIGNS) if reasoning_parser == AUTO else reasoning_parser
        calls = CALL_FORMATS.get(named or "hermes", NO_CALLS)
        written = next((w for w in calls.written if w.sign in (template or "")), None) if named else None
        return cls(THINKING.get(thinking or NONE, NO_THOUGHTS), calls, written)

    def kept_special_tokens(self, tools: Tools) -> tuple[str, ...]:
        """Markers that detokenizing must leave in the text, should they be special tokens (`SamplingParams`)."""
        thinking, calls = self.thinking, self.calls if tools else NO_CALLS
        return (*thinking.starts, *thinking.ends, *thinking.markers, *calls.markers)

    def parser(self, tools: Tools, prompt: str = "", *, forced: bool = False) -> Parser:
        """The parser of one answer.

        Args:
            tools: what the model may call; without any there are no calls.
            prompt: the end of the text that the model goes on with says whether the answer begins within a thought.
            forced: `constrained` made it calls.
        """
        calls = self.calls if tools or self.calls.whole else NO_CALLS
        opened = self.thinking.is_open(prompt)

        def reader(src: Source) -> Steps[None]:
            return read_answer(src, self.thinking, calls, tools, opened=opened, forced=forced)

        return Reading(reader, opened=opened)

    def constrained(
        self,
        form: StructuredOutputs | None,
        prompt: str,
        special: Mapping[str, int],
        forced: Mapping[str, Schema] | None = None,
        *,
        several: bool = False,
    ) -> StructuredOutputs | None:
        """The form of an answer to `prompt`: thoughts come first where the prompt begins one, and calls that must be
        made are written as the model writes them.

        Args:
            form: what is asked for; for calls, the same as plain JSON.
            prompt: the text that the model goes on with.
            special: texts of special tokens -> their ids.
            forced: functions of which one must be called -> schemas of their arguments.
            several: there may be several calls.
        """
        if form is None:
            return None
        rules = Rules(special)
        body = calls_grammar(self.written, forced, rules, several=several) if self.written and forced else ""
        if rules.ignored:  # the plain form says what is not enforced
            rules, body = Rules(special), ""
        thinks = self.thinking.is_open(prompt) and bool(self.thinking.ends)
        if thinks and not body and (schema := _json_schema(form)) is not None:
            body = rules.json(schema)
        if not body:
            return form
        start = f"{rules.text(self.thinking.ends[0])} /\\n{{0,2}}/ {body}" if thinks else body
        return StructuredOutputs(grammar=rules.grammar(start))


def _check(flag: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{flag} is {name!r}; expected one of {', '.join(known)}")


def _json_schema(form: StructuredOutputs) -> Schema | None:
    if form.json_object:
        return {"type": "object"}
    schema = loads(form.json) if isinstance(form.json, str) else form.json
    return schema if isinstance(schema, dict) else None


def _by_signs(template: str | None, signs: tuple[tuple[str, str], ...]) -> str | None:
    return next((name for sign, name in signs if template and sign in template), None)
