"""Beam search on the engine: prompts in, the likeliest sequences out. Names and scores as in vLLM.

Every beam is a request in lockstep: the engine samples one token with the best alternatives, the search picks, a beam
that goes on in several directions is forked (its pages shared until one of them is written), one that does not is
dropped. Knows tokens and log-probabilities; nothing of text, pages or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config.sampling import MAX_LOGPROBS, SamplingParams
from jaxllm.engine.engine import Engine, NewTokens
from jaxllm.engine.outputs import Logprob, logprob_entry
from jaxllm.scheduling.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What to search for.

    Attributes:
        beam_width: sequences kept at every step, and returned.
        max_tokens: tokens generated at most.
        ignore_eos: go on past end-of-sequence tokens.
        temperature: must be 0: beams are ranked by the model's own log-probabilities.
        length_penalty: a sequence's score is its log-probability divided by its length (prompt included, without an
            end-of-sequence token) to this power.
        include_stop_str_in_output: keep the end-of-sequence token in the text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_LOGPROBS // 2:
            raise ValueError(f"beam_width={self.beam_width}; it must be between 1 and {MAX_LOGPROBS // 2}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}; it must be at least 1")
        if self.temperature != 0.0:
            raise ValueError(f"temperature={self.temperature}; beams are ranked by log-probability, leave it at 0")


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence, prompt included. `logprobs` has an entry for every generated token."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Step:
    """A beam and one way to go on."""

    beam: Request
    token: int
    sequence: BeamSearchSequence


@dataclass(slots=True, eq=False)
class BeamSearch:
    """One prompt's search: feed it the engine's news until `finished`.

    Raises ValueError, when made, where the engine cannot take the prompt.
    """

    engine: Engine
    prompt: Sequence[int]
    params: BeamSearchParams
    token_text: Any = None
    complete: list[BeamSearchSequence] = field(default_factory=list)
    finished: bool = False
    _num_steps: int = 0
    _beams: dict[str, tuple[Request, BeamSearchSequence]] = field(default_factory=dict)
    _news: dict[str, NewTokens] = field(default_factory=dict)

    def __post_init__(self) -> None:
        width = self.params.beam_width
        sampling = SamplingParams(
            temperature=0.0, max_tokens=self.params.max_tokens, ignore_eos=True, logprobs=2 * width, detokenize=False
        )
        request = self.engine.add_request(self.prompt, sampling, lockstep=True)
        self._num_steps = request.limit - request.num_prompt
        self._beams[request.request_id] = (request, BeamSearchSequence(list(self.prompt), []))

    def feed(self, news: NewTokens) -> None:
        """Take one request's tokens; when every beam has its own, choose how to go on."""
        if news.request.request_id not in self._beams:
            return
        self._news[news.request.request_id] = news
        if len(self._news) == len(self._beams):
            self._choose()

    def abort(self) -> None:
        """End what is under way."""
        for request, _ in self._beams.values():
            self.engine.abort(request.request_id)
        self._beams.clear()
        self.finished = True

    def best(self) -> list[BeamSearchSequence]:
        """The `beam_width` best sequences."""
        return sorted(self.complete, key=self._score, reverse=True)[: self.params.beam_width]

    def _score(self, sequence: BeamSearchSequence) -> float:
        length = len(sequence.tokens) - (sequence.tokens[-1] in self.engine.eos_token_ids)
        return sequence.cum_logprob / length**self.params.length_penalty

    def _choose(self) -> None:
        steps = []
        for request_id, (request, sequence) in self._beams.items():
            steps += self._steps(request, sequence, self._news[request_id])
        self._news.clear()
        steps.sort(key=lambda step: self._score(step.sequence), reverse=True)
        chosen = steps[: self.params.beam_width]
        if not chosen or len(chosen[0].sequence.logprobs) >= self._num_steps:
            for step in chosen:
                step.sequence.finish_reason = "length"
                self.complete.append(step.sequence)
            self.abort()
        else:
            self._go_on(chosen)

    def _steps(self, request: Request, sequence: BeamSearchSequence, news: NewTokens) -> list[_Step]:
        """A beam's likeliest continuations; those that end the sequence are complete."""
        count = 2 * self.params.beam_width
        entry = logprob_entry(news.tokens[-1], news.sampled, len(news.tokens) - 1, count, self.token_text)
        steps = []
        for token, logprob in entry.items():
            longer = BeamSearchSequence(
                [*sequence.tokens, token], [*sequence.logprobs, entry], sequence.cum_logprob + logprob.logprob
            )
            if token in self.engine.eos_token_ids and not self.params.ignore_eos:
                longer.finish_reason, longer.stop_reason = "stop", token
                self.complete.append(longer)
            else:
                steps.append(_Step(request, token, longer))
        return steps

    def _go_on(self, chosen: Sequence[_Step]) -> None:
        """Drop beams nobody chose, fork those chosen more than once; the best step of a beam keeps its request."""
        kept = {step.beam.request_id for step in chosen}
        for request_id, (request, _) in self._beams.items():
            if request_id not in kept:
                self.engine.finish(request, "abort")
        going = []
        for i, step in reversed(list(enumerate(chosen))):
            if any(other.beam is step.beam for other in chosen[:i]):
                going.append((self.engine.fork(step.beam, step.token), step.sequence))
            else:
                self.engine.replace_last(step.beam, step.token)
                going.append((step.beam, step.sequence))
        self._beams = {request.request_id: (request, sequence) for request, sequence in reversed(going)}
