"""What a user gets back, and the text side of a request: tokens in, text and stop strings out.

Knows tokens and text; nothing of arrays, scheduling or pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxllm.config.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token at one position; `rank` 1 is the likeliest (None beyond the best 20)."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `finish_reason` is None while it grows, then `stop`, `length` or `abort`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt, in order.

    `error` says why a refused prompt has none; `warnings` what was asked for and is not enforced.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()


class TextStream(Protocol):
    """An incremental detokenizer; see `jaxllm.tokenizer`."""

    def push(self, ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


def logprob_entry(token: int, sampled: Any, i: int, count: int, token_text: Any) -> dict[int, Logprob]:
    """Row `i` of what the sampler reported: `token` and the `count` likeliest others."""
    best = sampled.top_ids[i].tolist()

    def logprob(token: int, value: float, rank: int | None) -> Logprob:
        return Logprob(value, rank, token_text(token) if token_text else None)

    own = float(sampled.logprobs[i])
    entry = {token: logprob(token, own, best.index(token) + 1 if token in best else None)}
    for rank, other in enumerate(best[:count], start=1):
        entry.setdefault(other, logprob(other, float(sampled.top_logprobs[i, rank - 1]), rank))
    return entry


class CompletionBuilder:
    """Grows one completion token by token.

    Text that could be the beginning of a stop string is held back from `stable_text`, so what was streamed
    never has to be taken back.
    """

    def __init__(self, index: int, params: SamplingParams, stream: TextStream | None, token_text: Any = None):
        self.output = CompletionOutput(index)
        self._params = params
        self._stream = stream
        self._token_text = token_text
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def append(self, tokens: Sequence[int], sampled: Any) -> str | None:
        """Add tokens; returns the stop string that ended it, if one did (later tokens are dropped)."""
        for i, token in enumerate(tokens):
            self.output.token_ids.append(token)
            if self.output.logprobs is not None:
                self._append_logprobs(token, sampled, i)
            if self._stream is not None and token not in (self._params.stop_token_ids or ()):
                before = len(self.output.text)
                self.output.text += self._stream.push([token])
                if (stop := self._find_stop(before)) is not None:
                    return stop
        return None

    def _append_logprobs(self, token: int, sampled: Any, i: int) -> None:
        assert self.output.logprobs is not None
        self.output.logprobs.append(logprob_entry(token, sampled, i, self._params.logprobs or 0, self._token_text))
        self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + float(sampled.logprobs[i])

    def _find_stop(self, before: int) -> str | None:
        """Look for a stop string that ends in the text added since `before`; cut the text there."""
        text, first = self.output.text, None
        if len(self.output.token_ids) < self._params.min_tokens:
            return None
        for stop in self._params.stop or ():
            at = text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (first is None or at < first[0]):
                first = (at, stop)
        if first is None:
            return None
        at, stop = first
        self.output.text = text[: at + len(stop) if self._params.include_stop_str_in_output else at]
        self._stream = None
        self.output.finish_reason, self.output.stop_reason = "stop", stop
        return stop

    def finish(self, reason: str, stop_reason: int | str | None) -> None:
        """Close it; a stop string found before wins over what the engine says."""
        if self.output.finish_reason is not None:
            return
        if self._stream is not None:
            before = len(self.output.text)
            if stop_reason is not None and self._params.include_stop_str_in_output:
                self.output.text += self._stream.push(self.output.token_ids[-1:])
            self.output.text += self._stream.finish()
            if self._find_stop(before) is not None:
                return
        self.output.finish_reason, self.output.stop_reason = reason, stop_reason

    @property
    def stable_text(self) -> str:
        """Text that no later token can take back."""
        text = self.output.text
        if self.output.finish_reason is not None:
            return text
        longest = 0
        for stop in self._params.stop or ():
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return text[: len(text) - longest]
