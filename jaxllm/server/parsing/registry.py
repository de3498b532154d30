"""Every format by the name that vLLM gives it, and which of them a chat template speaks.

The command line, the routes and tests choose here; adding a format is one entry.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.server.parsing import harmony, json_formats, parameter_formats, pythonic
from jaxllm.server.parsing.events import Parser, Tools
from jaxllm.server.parsing.formats import NO_CALLS, NO_THOUGHTS, CallFormat, Thinking, read_answer, read_forced
from jaxllm.server.parsing.reading import Reading

AUTO = "auto"
NONE = "none"

CALL_FORMATS: dict[str, CallFormat] = {
    "deepseek_v3": json_formats.DEEPSEEK,
    "deepseek_v31": json_formats.DEEPSEEK,
    "deepseek_v32": parameter_formats.DEEPSEEK_V32,
    "ernie45": json_formats.HERMES,
    "glm45": parameter_formats.GLM,
    "glm47": parameter_formats.GLM,
    "granite": json_formats.GRANITE,
    "granite-20b-fc": json_formats.objects("<function_call>"),
    "granite4": json_formats.HERMES,
    "hermes": json_formats.HERMES,
    "hunyuan_a13b": json_formats.TOOL_CALLS,
    "internlm": json_formats.objects("<|action_start|><|plugin|>", close="<|action_end|>"),
    "jamba": json_formats.TOOL_CALLS,
    "kimi_k2": json_formats.KIMI,
    "lfm2": pythonic.LFM2,
    "llama3_json": json_formats.LLAMA3,
    "llama4_json": json_formats.LLAMA3,
    "llama4_pythonic": pythonic.LLAMA4,
    "longcat": json_formats.objects("<longcat_tool_call>", close="</longcat_tool_call>"),
    "minimax": json_formats.TOOL_CALLS,
    "minimax_m2": parameter_formats.MINIMAX_M2,
    "mistral": json_formats.MISTRAL,
    "olmo3": pythonic.OLMO3,
    "openai": harmony.HARMONY,
    "phi4_mini_json": json_formats.objects("functools"),
    "pythonic": pythonic.PYTHONIC,
    "qwen3_coder": parameter_formats.QWEN3_CODER,
    "qwen3_xml": parameter_formats.QWEN3_CODER,
    "seed_oss": parameter_formats.SEED,
    "xlam": json_formats.LLAMA3,
}

_TAGS = Thinking(starts=("<think>",), ends=("</think>",))
_TAGS_FROM_START = Thinking(starts=("<think>",), ends=("</think>",), from_start=True)
THINKING: dict[str, Thinking] = {
    "deepseek_r1": _TAGS_FROM_START,
    "deepseek_v3": _TAGS,
    "ernie45": _TAGS,
    "glm45": _TAGS,
    "granite": Thinking(
        starts=("<think>", "Here is my thought process:", "Here's my thought process:"),
        ends=("</think>", "Here is my response:", "Here's my response:"),
    ),
    "holo2": _TAGS,
    "hunyuan_a13b": Thinking(starts=("<think>",), ends=("</think>\n<answer>", "</think>")),
    "kimi_k2": _TAGS,
    "minimax_m2": _TAGS_FROM_START,
    "mistral": Thinking(starts=("[THINK]",), ends=("[/THINK]",)),
    "nemotron_v3": _TAGS,
    "olmo3": _TAGS,
    "openai_gptoss": harmony.HARMONY_THINKING,
    "qwen3": _TAGS,
    "seed_oss": Thinking(starts=("<seed:think>",), ends=("</seed:think>",)),
    "step3": _TAGS_FROM_START,
}

# What only the templates of one format contain, the most telling first.
_CALL_SIGNS = (
    ("<|channel|>analysis", "openai"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("｜DSML｜", "deepseek_v32"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<seed:tool_call>", "seed_oss"),
    ("<longcat_tool_call>", "longcat"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<tool_calls>", "jamba"),
    ("<function_calls>", "olmo3"),
    ("<|python_start|>", "llama4_pythonic"),
    ("ipython", "llama3_json"),
)
_THINKING_SIGNS = (
    ("<|channel|>analysis", "openai_gptoss"),
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed_oss"),
    ("</think>", "qwen3"),
    ("Here is my thought process:", "granite"),
)


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

    def kept_special_tokens(self, tools: Tools) -> tuple[str, ...]:
        """Markers that detokenizing must leave in the text, should they be special tokens (`SamplingParams`)."""
        thinking, calls = self.thinking, self.calls if tools else NO_CALLS
        return (*thinking.starts, *thinking.ends, *thinking.markers, *calls.markers)

    def parser(self, tools: Tools, prompt: str = "", params: SamplingParams | None = None) -> Parser:
        """The parser of one answer.

        Args:
            tools: what the model may call; without any there are no calls.
            prompt: the end of the text that the model goes on with says whether the answer begins within a thought.
            params: an answer that they constrain to be JSON as a whole begins with no thought.
        """
        whole = self.thinking.whole or self.calls.whole
        if whole is not None:
            return Reading(lambda src: whole(src, tools))
        calls = self.calls if tools else NO_CALLS
        form = params.structured_outputs if params else None
        is_json = isinstance(form, StructuredOutputs) and (form.json is not None or bool(form.json_object))
        opened = not is_json and self.thinking.is_open(prompt)
        return Reading(lambda src: read_answer(src, self.thinking, calls, tools, opened), opened=opened)

    def forced_parser(self, tools: Tools) -> Parser:
        """The parser of an answer that `ToolUse.form` made calls."""
        return Reading(lambda src: read_forced(src, tools, self.calls.new_id))


def _check(flag: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{flag} is {name!r}; expected one of {', '.join(known)}")


def _by_signs(template: str | None, signs: tuple[tuple[str, str], ...], otherwise: str) -> str:
    return next((name for sign, name in signs if template and sign in template), otherwise)
