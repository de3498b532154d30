"""Every format by the name that vLLM gives it, and which of them a chat template speaks.

The command line, the routes and tests choose here; adding a format is one entry.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.server.parsing import json_formats
from jaxllm.server.parsing.events import Parser, Tools
from jaxllm.server.parsing.formats import NO_CALLS, NO_THOUGHTS, CallFormat, Thinking, read_answer, read_forced
from jaxllm.server.parsing.reading import Reading

AUTO = "auto"
NONE = "none"

CALL_FORMATS: dict[str, CallFormat] = {
    "hermes": json_formats.HERMES,
    "llama3_json": json_formats.LLAMA3,
    "granite": json_formats.GRANITE,
    "mistral": json_formats.MISTRAL,
}
_THINK = Thinking(starts=("<think>",), ends=("</think>",))
_THINK_FROM_START = Thinking(starts=("<think>",), ends=("</think>",), from_start=True)
THINKING: dict[str, Thinking] = {
    "deepseek_r1": _THINK_FROM_START,
    "qwen3": _THINK,
}

# What only the templates of one format contain, most telling first.
_CALL_SIGNS = (
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("ipython", "llama3_json"),
)
_THINKING_SIGNS = (("</think>", "qwen3"),)


def call_parser_names() -> list[str]:
    """What `--tool-call-parser` takes."""
    return [AUTO, NONE, *sorted(CALL_FORMATS)]


def reasoning_parser_names() -> list[str]:
    """What `--reasoning-parser` takes."""
    return [AUTO, NONE, *sorted(THINKING)]


@final
@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How one model's answers are read: its thoughts and its calls."""

    thinking: Thinking
    calls: CallFormat

    @classmethod
    def chosen(cls, template: str | None, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO) -> AnswerFormat:
        """By name, or by what the chat template contains where the name is `auto`.

        Raises:
            ValueError: a name that does not exist.
        """
        _check("--tool-call-parser", tool_call_parser, call_parser_names())
        _check("--reasoning-parser", reasoning_parser, reasoning_parser_names())
        calls = _by_signs(template, _CALL_SIGNS, "hermes") if tool_call_parser == AUTO else tool_call_parser
        thinking = _by_signs(template, _THINKING_SIGNS, NONE) if reasoning_parser == AUTO else reasoning_parser
        return cls(THINKING.get(thinking, NO_THOUGHTS), CALL_FORMATS.get(calls, NO_CALLS))

    def parser(self, tools: Tools, prompt: str = "", params: SamplingParams | None = None) -> Parser:
        """The parser of one answer.

        Args:
            tools: what the model may call; without any there are no calls.
            prompt: the end of the text that the model goes on with says whether the answer begins within a thought.
            params: an answer that they constrain to be JSON as a whole begins with no thought.
        """
        calls = self.calls if tools else NO_CALLS
        form = params.structured_outputs if params else None
        is_json = isinstance(form, StructuredOutputs) and (form.json is not None or bool(form.json_object))
        opened = not is_json and self.thinking.is_open(prompt)
        return Reading(lambda src: read_answer(src, self.thinking, calls, tools, opened), opened=opened)

    def forced_parser(self, tools: Tools) -> Parser:
        """The parser of an answer that `forced_schema` made one call."""
        return Reading(lambda src: read_forced(src, tools, self.calls.new_id))


def _check(flag: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{flag} is {name!r}; expected one of {', '.join(known)}")


def _by_signs(template: str | None, signs: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((name for sign, name in signs if template and sign in template), otherwise)
