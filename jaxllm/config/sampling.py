"""What a user asks of the sampler, validated once. Plain Python; names and meanings as in vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 16
MAX_STOP_CHARS = 1024
MAX_N = 128
MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES = 1000
MAX_BAD_WORDS = 128
MAX_ALLOWED_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """A form that the answer must have; exactly one field is set.

    Attributes:
        json: a JSON schema (a dict, or its text).
        json_object: any JSON object.
        regex: the whole answer matches it.
        choice: one of these strings.
        grammar: a Lark grammar with a `start` rule, or a GBNF grammar with a `root`.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"structured_outputs sets {given or 'nothing'}; set exactly one of {self.__slots__}")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"structured_outputs.{name} must be text")
        choices = self.choice or ()
        if self.choice is not None and not (
            isinstance(choices, Sequence)
            and not isinstance(choices, str)
            and 1 <= len(choices) <= MAX_CHOICES
            and all(isinstance(c, str) and c for c in choices)
        ):
            raise ValueError(f"structured_outputs.choice must be 1 to {MAX_CHOICES} non-empty strings")
        schema = self.json if isinstance(self.json, str) or self.json is None else json.dumps(self.json)
        size = max(map(len, (schema or "", self.regex or "", self.grammar or "")))
        if max(size, sum(map(len, choices))) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"structured_outputs is longer than {MAX_GRAMMAR_CHARS} characters; shorten it")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Decoding controls of one request.

    Attributes:
        n: completions per prompt.
        temperature: 0 is greedy.
        top_p: sample from the most likely tokens that together have this share; 1.0 is off.
        top_k: sample from this many most likely tokens; 0 (or -1) is off.
        min_p: sample from tokens at least this share as likely as the most likely one; 0.0 is off.
        presence_penalty: subtracted once from the logits of tokens that were generated.
        frequency_penalty: subtracted from their logits for every time they were generated.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        seed: makes the request's random stream a function of (seed, position) alone.
        stop (TEXT): end at this text, or any of several; cut off unless `include_stop_str_in_output`.
        stop_token_ids: end at any of these tokens.
        ignore_eos: keep going past end-of-sequence tokens.
        max_tokens: the most tokens to generate.
        min_tokens: the fewest tokens to generate.
        logprobs: number of alternatives to report per token (0: only the sampled one), None: none.
        logit_bias: token id -> value added to its logit.
        num_speculative_tokens: drafted per iteration at most, 0 none; default: the engine's.
        bad_words: texts that may not be generated, with or without a space before them.
        allowed_token_ids: the only tokens that may be generated.
        truncate_prompt_tokens: only so many of the prompt's last tokens are used; -1: as many as the model takes.
        prompt_logprobs: number of alternatives to report per prompt token; needs a pass of its own.
        structured_outputs: a form that the answer must have (`StructuredOutputs` or a dict of its fields).
        detokenize: False leaves text empty.
        kept_special_tokens: special tokens that stay in the text under `skip_special_tokens`: a parser's markers.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    num_speculative_tokens: int | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | dict[str, Any] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    kept_special_tokens: Sequence[str] = ()
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is_int(value):
                raise ValueError(f"{name}={value!r}; it must be a whole number")
            _check_range(name, value, low, high)
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r}; it must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower it")
        object.__setattr__(self, "stop", self._stop_strings())
        object.__setattr__(self, "kept_special_tokens", _items("kept_special_tokens", self.kept_special_tokens))
        object.__setattr__(self, "structured_outputs", _structured(self.structured_outputs))
        self._check_token_lists()
        self._check_rules()

    def _stop_strings(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if len(stop) > MAX_STOP_STRINGS or any(
            not isinstance(s, str) or not 0 < len(s) <= MAX_STOP_CHARS for s in stop
        ):
            raise ValueError(
                f"stop={self.stop!r}; it must be at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters"
            )
        return stop

    def _check_token_lists(self) -> None:
        ids = _items("stop_token_ids", self.stop_token_ids)
        if len(ids) > MAX_STOP_TOKEN_IDS or any(not _is_int(i) or i < 0 for i in ids):
            raise ValueError(
                f"stop_token_ids={self.stop_token_ids!r}; it must be at most {MAX_STOP_TOKEN_IDS} token ids"
            )
        object.__setattr__(self, "stop_token_ids", ids)
        bias = self.logit_bias or {}
        if not isinstance(bias, dict):
            raise ValueError(f"logit_bias={bias!r}; it must map token ids to numbers")
        if len(bias) > MAX_LOGIT_BIAS:
            raise ValueError(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS} are allowed")
        for token, value in bias.items():
            if not _is_int(token) or token < 0:
                raise ValueError(f"logit_bias has key {token!r}; keys must be token ids")
            _check_range(f"logit_bias[{token}]", value, -100.0, 100.0)

    def _check_rules(self) -> None:
        words, allowed = _items("bad_words", self.bad_words), _items("allowed_token_ids", self.allowed_token_ids)
        if len(words) > MAX_BAD_WORDS or any(not isinstance(w, str) or not 0 < len(w) <= MAX_STOP_CHARS for w in words):
            raise ValueError(f"bad_words must be at most {MAX_BAD_WORDS} texts of 1 to {MAX_STOP_CHARS} characters")
        if self.allowed_token_ids is not None and not 1 <= len(allowed) <= MAX_ALLOWED_TOKENS:
            raise ValueError(f"allowed_token_ids has {len(allowed)} entries; give 1 to {MAX_ALLOWED_TOKENS}")
        if bad := [i for i in allowed if not _is_int(i) or i < 0]:
            raise ValueError(f"allowed_token_ids has {bad[0]!r}; entries must be token ids")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 leaves no prompt; give at least 1, or -1 for what fits")
        object.__setattr__(self, "bad_words", words)
        object.__setattr__(self, "allowed_token_ids", allowed or None)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler must look at the request's history."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def plain_greedy(self) -> bool:
        """Whether an argmax over the raw logits is all that is asked."""
        return (
            self.greedy
            and not self.has_penalties
            and not self.logit_bias
            and self.logprobs is None
            and self.min_tokens == 0
            and self.structured_outputs is None
            and not self.bad_words
            and not self.allowed_token_ids
        )


_HUGE = 2**31 - 1
_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 1e-9, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 1e-2, 100.0),
)
_INTEGERS = (
    ("n", 1, MAX_N),
    ("top_k", -1, _HUGE),
    ("max_tokens", 1, _HUGE),
    ("min_tokens", 0, _HUGE),
    ("seed", -(2**63), 2**64 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("truncate_prompt_tokens", -1, _HUGE),
    ("num_speculative_tokens", 0, _HUGE),
)


_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "num_speculative_tokens")
_FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _items(name: str, value: object) -> tuple:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name}={value!r}; it must be a list")
    return tuple(value)


def _check_range(name: str, value: object, low: float, high: float) -> None:
    if not _is_int(value) and not (isinstance(value, float) and math.isfinite(value)):
        raise ValueError(f"{name}={value!r}; it must be a finite number")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}={value!r}; it must be between {low:g} and {high:g}")


def _structured(value: StructuredOutputs | dict[str, Any] | None) -> StructuredOutputs | None:
    if value is None or isinstance(value, StructuredOutputs):
        return value
    unknown = sorted(set(value) - set(StructuredOutputs.__slots__)) if isinstance(value, dict) else value
    if unknown or not isinstance(value, dict):
        raise ValueError(f"structured_outputs={unknown!r} is not known; use one of {StructuredOutputs.__slots__}")
    return StructuredOutputs(**value)
