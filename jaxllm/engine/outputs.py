"""What a user gets back, and the text side of a request: tokens in, text and stop strings out.

Knows tokens and text; nothing of arrays, scheduling or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.request import Ending


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
class CompletionDelta:
    """What is new of one completion; `finish_reason` is set on its last one.

    `num_tokens`, `num_chars` and `cumulative_logprob` are the whole completion's, this delta included.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_tokens: int = 0
    num_chars: int = 0
    cumulative_logprob: float | None = None


def as_of(whole: CompletionOutput, delta: CompletionDelta) -> CompletionOutput:
    """A completion as it was when `delta` was made, however far it has grown since."""
    return CompletionOutput(
        index=whole.index,
        text=whole.text[: delta.num_chars],
        token_ids=whole.token_ids[: delta.num_tokens],
        cumulative_logprob=delta.cumulative_logprob,
        logprobs=whole.logprobs[: delta.num_tokens] if whole.logprobs is not None else None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )


@dataclass(slots=True)
class RequestOutput:
    """All completions of one prompt, in order.

    `error` says why a refused prompt has none; `warnings` what was asked for and is not enforced;
    `kv_transfer_params` where another server may fetch what was computed of the prompt.
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
    kv_transfer_params: dict[str, Any] | None = None


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

    Text that could be the beginning of a stop string is held back from `output.text`, so what was streamed never has
    to be taken back.

    Args:
        index: of the completion.
        params: what was asked.
        make_stream: makes a detokenizer at the beginning of the text; None leaves the text empty.
        token_text: how one token reads, for logprobs.
    """

    def __init__(
        self, index: int, params: SamplingParams, make_stream: Callable[[], TextStream] | None, token_text: Any = None
    ):
        self.output = CompletionOutput(index)
        self._params = params
        self._make_stream = make_stream
        self._stream = make_stream() if make_stream is not None else None
        self._token_text = token_text
        self._text = ""  # what is held back included
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def append(self, tokens: Sequence[int], sampled: Any, ending: Ending | None = None) -> CompletionDelta:
        """Add tokens, and close the completion where they end it.

        Args:
            tokens: new ones.
            sampled: what the sampler reported of them.
            ending: how the request ends with the last of them, if it does; a stop string found before comes first.

        Returns:
            What is new; later tokens than a stop string are dropped.
        """
        num_tokens, num_chars = len(self.output.token_ids), len(self.output.text)
        for i, token in enumerate(tokens):
            self.output.token_ids.append(token)
            if self.output.logprobs is not None:
                self._append_logprobs(token, sampled, i)
            if self._push(token):
                break
        self._close(ending)
        self.output.text = self._stable_text()
        return self._delta(num_tokens, num_chars)

    def finish(self, ending: Ending) -> CompletionDelta:
        """Close a completion that gets no more tokens; one that is closed stays as it is."""
        return self.append([], None, ending)

    def rewind(self, num_tokens: int) -> None:
        """Go back to the first `num_tokens` tokens: those after them come again."""
        output = self.output
        del output.token_ids[num_tokens:]
        output.finish_reason = output.stop_reason = None
        if output.logprobs is not None:
            del output.logprobs[num_tokens:]
            known = zip(output.logprobs, output.token_ids, strict=True)
            output.cumulative_logprob = sum((entry[token].logprob for entry, token in known), 0.0)
        self._stream, self._text = self._make_stream() if self._make_stream is not None else None, ""
        for token in output.token_ids:
            self._push(token)
        output.text = self._stable_text()

    def _push(self, token: int) -> bool:
        """Add a token's text; whether that completed a stop string."""
        if self._stream is None or token in (self._params.stop_token_ids or ()):
            return False
        before = len(self._text)
        self._text += self._stream.push([token])
        return self._found_stop(before)

    def _delta(self, num_tokens: int, num_chars: int) -> CompletionDelta:
        output = self.output
        return CompletionDelta(
            output.index,
            output.text[num_chars:],
            output.token_ids[num_tokens:],
            output.logprobs[num_tokens:] if output.logprobs is not None else None,
            output.finish_reason,
            output.stop_reason,
            len(output.token_ids),
            len(output.text),
            output.cumulative_logprob,
        )

    def _append_logprobs(self, token: int, sampled: Any, i: int) -> None:
        assert self.output.logprobs is not None
        self.output.logprobs.append(logprob_entry(token, sampled, i, self._params.logprobs or 0, self._token_text))
        self.output.cumulative_logprob = (self.output.cumulative_logprob or 0.0) + float(sampled.logprobs[i])

    def _found_stop(self, before: int) -> bool:
        """Look for a stop string that ends in the text added since `before`; cut the text there."""
        text, first = self._text, None
        if len(self.output.token_ids) < self._params.min_tokens:
            return False
        for stop in self._params.stop or ():
            at = text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (first is None or at < first[0]):
                first = (at, stop)
        if first is None:
            return False
        at, stop = first
        self._text = text[: at + len(stop) if self._params.include_stop_str_in_output else at]
        self._stream = None
        self.output.finish_reason, self.output.stop_reason = "stop", stop
        return True

    def _close(self, ending: Ending | None) -> None:
        """Release what is held back; it may complete a stop string, which wins over what the engine says."""
        if ending is None or self.output.finish_reason is not None:
            return
        if self._stream is not None:
            before = len(self._text)
            if ending.stop_reason is not None and self._params.include_stop_str_in_output:
                self._text += self._stream.push(self.output.token_ids[-1:])
            self._text += self._stream.finish()
            if self._found_stop(before):
                return
        self.output.finish_reason, self.output.stop_reason = ending.reason, ending.stop_reason

    def _stable_text(self) -> str:
        """Text that no later token can take back."""
        text = self._text
        if self.output.finish_reason is not None or not self._params.stop:
            return text
        longest = 0
        for stop in self._params.stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return text[: len(text) - longest]
