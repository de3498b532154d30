"""Beam search on the engine: prompts in, the likeliest sequences out. Names and scores as in vLLM.

Every beam is a stepwise request: the engine samples one token with the best alternatives and waits; the search picks,
puts the chosen token in place of the sampled one, forks a beam that goes on in several directions (its pages are shared
until one of them is written) and drops one that does not go on. Knows tokens and log-probabilities; nothing of pages
or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from jaxllm.config.sampling import MAX_LOGPROBS, SamplingParams
from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import EngineError
from jaxllm.engine.outputs import CompletionDelta, Logprob, logprob_entry
from jaxllm.scheduling.request import Ending, Request


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
        for name in ("beam_width", "max_tokens"):
            if type(value := getattr(self, name)) is not int:
                raise ValueError(f"{name}={value!r}; it must be a whole number")
        if not isinstance(self.length_penalty, int | float):
            raise ValueError(f"length_penalty={self.length_penalty!r}; it must be a number")
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

    beam: _Beam
    token: int
    sequence: BeamSearchSequence


@dataclass(slots=True, eq=False)
class _Beam:
    """One of the sequences under way, and its request's listener.

    Attributes:
        entry: the likeliest next tokens, once they are known for this step.
    """

    search: BeamSearch
    sequence: BeamSearchSequence
    request: Request | None = None
    entry: dict[int, Logprob] | None = None

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        if ending is not None and ending.error is not None:
            return ending
        search = self.search
        count = 2 * search.params.beam_width
        self.entry = logprob_entry(tokens[-1], sampled, len(tokens) - 1, count, search.jobs.token_text)
        search.choose()
        return ending

    def end(self, request: Request) -> None:
        if request.finish_reason != "length":  # else it has said how it goes on
            self.search.lost(self, request.error)

    def rewind(self, request: Request) -> bool:
        if len(request.token_ids) == len(self.sequence.tokens):
            self.entry = None
        return not self.search.is_choosing


@final
@dataclass(slots=True, eq=False)
class BeamSearch:
    """One prompt's search: a `Work` (see `jaxllm.engine.work`).

    Attributes:
        prompt: checked token ids.
        limit: length at which every sequence ends.
        complete: sequences that have ended.
        is_choosing: beams are being forked and dropped; where that is cut off the search cannot go on.
    """

    jobs: Jobs
    prompt: list[int]
    params: BeamSearchParams
    sampling: SamplingParams
    limit: int
    complete: list[BeamSearchSequence] = field(default_factory=list)
    notify: Callable[[Any, CompletionDelta | None], None] | None = None
    error: Exception | None = None
    finished: bool = False
    _beams: list[_Beam] = field(default_factory=list)
    is_choosing: bool = False

    @classmethod
    def of(cls, jobs: Jobs, prompt: Any, params: BeamSearchParams) -> BeamSearch:
        """A search for one prompt; touches nothing of the engine. Raises ValueError where that cannot take it."""
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=params.max_tokens,
            ignore_eos=True,
            logprobs=2 * params.beam_width,
            detokenize=False,
        )
        ids, limit = jobs.engine.check_request(jobs.token_ids(prompt), sampling)
        return cls(jobs, ids, params, sampling, limit)

    @property
    def on_device(self) -> bool:
        """Whether the device holds anything of it."""
        return any(beam.request is not None and beam.request.on_device for beam in self._beams)

    def start(self) -> None:
        """Queue the prompt as the first beam."""
        beam = _Beam(self, BeamSearchSequence(list(self.prompt), []))
        beam.request = self.jobs.engine.make_request(
            self.prompt, self.sampling, self.limit, stepwise=True, listener=beam
        )
        self._beams = [beam]
        self.jobs.engine.add(beam.request)

    def abort(self) -> None:
        """End what is under way."""
        self._stop(EngineError("the search was aborted"))

    def result(self) -> BeamSearchOutput:
        """The `beam_width` best sequences. Raises what ended the search without one."""
        if self.error is not None:
            raise self.error
        best = sorted(self.complete, key=self._score, reverse=True)[: self.params.beam_width]
        return BeamSearchOutput([self._with_text(sequence) for sequence in best])

    def choose(self) -> None:
        """When every beam knows how it could go on, go on."""
        if all(beam.entry is not None for beam in self._beams):
            self.is_choosing = True
            self._choose()
            self.is_choosing = False

    def lost(self, beam: _Beam, error: Exception | None) -> None:
        """A beam's request has ended; where the search did not want that, it ends too."""
        if beam in self._beams:
            self._stop(error or EngineError("the engine failed while it worked on this search"))

    def _stop(self, error: Exception | None) -> None:
        """End the search, and every request of it, however many of them it knows: a fork may have been cut off."""
        if not self.finished:
            self.error, self._beams, self.finished = error, [], True
        for request in self.jobs.engine.unfinished:
            if isinstance(request.listener, _Beam) and request.listener.search is self:
                self.jobs.engine.finish(request, Ending("abort"))
        notify, self.notify = self.notify, None
        if notify is not None:
            notify(self, None)

    def _drop(self, beam: _Beam) -> None:
        if beam.request is not None:
            self.jobs.engine.finish(beam.request, Ending("abort"))

    def _score(self, sequence: BeamSearchSequence) -> float:
        length = len(sequence.tokens) - (sequence.tokens[-1] in self.jobs.engine.eos_token_ids)
        return sequence.cum_logprob / length**self.params.length_penalty

    def _choose(self) -> None:
        steps = [step for beam in self._beams for step in self._steps(beam)]
        steps.sort(key=lambda step: self._score(step.sequence), reverse=True)
        chosen = steps[: self.params.beam_width]
        if chosen and len(chosen[0].sequence.tokens) < self.limit:
            self._go_on(chosen)
            return
        for step in chosen:
            step.sequence.finish_reason = "length"
            self.complete.append(step.sequence)
        self._stop(None)

    def _steps(self, beam: _Beam) -> list[_Step]:
        """A beam's likeliest continuations; those that end the sequence are complete."""
        assert beam.entry is not None
        steps, before = [], beam.sequence
        for token, logprob in beam.entry.items():
            longer = BeamSearchSequence(
                [*before.tokens, token], [*before.logprobs, beam.entry], before.cum_logprob + logprob.logprob
            )
            if token in self.jobs.engine.eos_token_ids and not self.params.ignore_eos:
                longer.finish_reason, longer.stop_reason = "stop", token
                self.complete.append(longer)
            else:
                steps.append(_Step(beam, token, longer))
        return steps

    def _go_on(self, chosen: Sequence[_Step]) -> None:
        """Drop beams nobody chose, fork those chosen more than once; the best step of a beam keeps its request."""
        engine, before = self.jobs.engine, self._beams
        self._beams = [beam for beam in before if any(step.beam is beam for step in chosen)]
        for beam in before:
            if beam not in self._beams:
                self._drop(beam)
        going: list[_Beam] = []
        for i, step in reversed(list(enumerate(chosen))):
            beam, request = step.beam, step.beam.request
            assert request is not None, "a beam without a request knows no next tokens"
            if any(other.beam is beam for other in chosen[:i]):
                beam = _Beam(self, step.sequence)
                request = beam.request = engine.fork(request, listener=beam)
            going.append(beam)
            engine.truncate(request, len(step.sequence.tokens) - 1)
            engine.extend(request, [step.token])
            beam.sequence, beam.entry = step.sequence, None
        self._beams = going[::-1]

    def _with_text(self, sequence: BeamSearchSequence) -> BeamSearchSequence:
        if self.jobs.token_text is not None:
            ended = sequence.finish_reason == "stop" and not self.params.include_stop_str_in_output
            sequence.text = self.jobs.tokenizer.decode(sequence.tokens[:-1] if ended else sequence.tokens)
        return sequence
