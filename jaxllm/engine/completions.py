"""A prompt and its completions: engine requests on one side, text, logprobs and ends on the other.

Joins engine (tokens) and tokenizer (text). Knows nothing of threads, event loops or protocols.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.config.sampling import SamplingParams
from jaxllm.constraints.grammars import GrammarCompiler
from jaxllm.constraints.token_rules import CopiedConstraint, all_of, token_rules
from jaxllm.engine.engine import Engine
from jaxllm.engine.outputs import CompletionBuilder, CompletionDelta, RequestOutput, logprob_entry
from jaxllm.engine.prompts import Asked, as_token_ids, read_prompt
from jaxllm.engine.scoring import Scorer, ScoringPass
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.scheduling.request import Ending, Request

if TYPE_CHECKING:
    from jaxllm.tokenizer import Tokenizer
    from jaxllm.weights.classifier import ClassifierHead


@dataclass(slots=True, eq=False)
class Job:
    """One prompt on its way, from arrival to the last token of its last completion: a `Work`.

    Attributes:
        limit: length at which its requests end, from the one check of the prompt.
        scores: the pass for prompt logprobs, which runs first.
    """

    owner: Jobs
    output: RequestOutput
    params: SamplingParams
    limit: int = 0
    asked: Asked | None = None
    constraint: CopiedConstraint | None = None
    streamed: bool = False
    adapter: Adapter | None = None
    request_id: str | None = None
    requests: list[Request] = field(default_factory=list)
    scores: ScoringPass | None = None
    notify: Callable[[Any, CompletionDelta | None], None] | None = None
    error: Exception | None = None
    created: float = field(default_factory=time.perf_counter)
    first_token: float | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return self.output.finished

    @property
    def on_device(self) -> bool:
        """Whether the device holds anything of it."""
        scored = self.scores is not None and self.scores.on_device
        return scored or any(request.on_device for request in self.requests)

    def start(self) -> None:
        """Queue it, its scoring pass first. Raises ValueError, and then nothing stays behind."""
        if self.params.prompt_logprobs is None:
            self.owner.queue(self)
            return
        self.scores = ScoringPass(self.owner.scorer, self.output.prompt_token_ids, adapter=self.adapter)
        self.scores.notify = self._scored
        self.scores.start()

    def _scored(self, scores: ScoringPass, _: CompletionDelta | None) -> None:
        if scores.error is not None:
            self._end(scores.error)
            return
        self.owner.attach_scores(self, scores)
        try:
            self.owner.queue(self)
        except ValueError as error:
            self._end(error)

    def heard(self, delta: CompletionDelta) -> None:
        """One of its completions has grown, or ended."""
        if self.notify is not None and (delta.token_ids or delta.text or delta.finish_reason):
            self.notify(self, delta)

    def ended(self) -> None:
        """One of its requests has ended: the last one ends it."""
        if not any(completion.finish_reason is None for completion in self.output.outputs):
            self._end(next((request.error for request in self.requests if request.error), None))

    def _end(self, error: Exception | None) -> None:
        if self.output.finished:
            return
        now = time.perf_counter()
        self.error, self.output.error = error, None if error is None else str(error)
        self.output.metrics = {
            "ttft_s": (self.first_token or now) - self.created,
            "latency_s": now - self.created,
            "num_preemptions": float(sum(request.num_preemptions for request in self.requests)),
        }
        if self.owner.engine.runner.shapes.num_drafts:
            for what in ("num_draft_tokens", "num_accepted_tokens"):
                self.output.metrics[what] = float(sum(getattr(request, what) for request in self.requests))
        self.output.finished = True
        if self.notify is not None:
            self.notify(self, None)

    def abort(self) -> None:
        """End it now; what is finished is left alone."""
        if self.scores is not None:
            self.scores.abort()
        for request in self.requests:
            self.owner.engine.finish(request, Ending("abort"))


@dataclass(frozen=True, slots=True)
class _Completion:
    """Listens to one request of a job."""

    job: Job
    builder: CompletionBuilder

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        job = self.job
        if job.first_token is None:
            job.first_token = time.perf_counter()
            job.output.num_cached_tokens = request.num_cached or 0
        delta = self.builder.append(tokens, sampled, ending)
        job.heard(delta)
        if delta.finish_reason is None:
            return None
        error = ending.error if ending is not None and delta.finish_reason == ending.reason else None
        return Ending(delta.finish_reason, delta.stop_reason, error)  # a stop string may have come before the error

    def end(self, request: Request) -> None:
        if self.builder.output.finish_reason is None:
            self.job.heard(self.builder.finish(Ending(request.finish_reason or "abort", request.stop_reason)))
        self.job.ended()

    def rewind(self, request: Request) -> bool:
        self.builder.rewind(len(request.output_ids))
        return True


class Exchange(Protocol):
    """Where requests come from that were begun elsewhere, and go on elsewhere; see `jaxllm.disaggregation.exchange`."""

    def check(self, params: Mapping[str, Any]) -> None: ...
    def attach(self, request: Request, params: Mapping[str, Any], output: RequestOutput) -> None: ...
    def pump(self) -> None: ...


class Jobs:
    """Makes jobs for one engine.

    `prepare` may run on any thread; everything else belongs to whoever steps the engine.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        exchange: Exchange | None = None,
        classifier: ClassifierHead | None = None,
    ):
        self.classifier = classifier
        self.exchange = exchange
        self.after_step: list[Callable[[], None]] = [] if exchange is None else [exchange.pump]
        self.engine, self.scorer = engine, Scorer(engine.scoring_engine)
        self._tokenizer = tokenizer
        vocab_size = engine.runner.model.cfg.vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size, engine.eos_token_ids) if tokenizer else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True); give prompt_token_ids")
        return self._tokenizer

    @property
    def token_text(self) -> Any:
        """How one token reads, where there is a tokenizer."""
        return self._tokenizer.token_text if self._tokenizer else None

    @property
    def has_work(self) -> bool:
        """Whether anything is unfinished."""
        return self.engine.has_work or self.scorer.has_work

    def step(self) -> None:
        """One iteration of the engine, and one chunk of a scoring pass."""
        self.engine.step()
        self.scorer.step()
        for call in self.after_step:
            call()

    def recover(self) -> None:
        """Set right what an exception cut off; see `Engine.recover`."""
        self.engine.is_sound = False
        self.scorer.restart()
        self.engine.recover()

    def prepare(
        self, prompt: Any, params: SamplingParams, *, streamed: bool = False, adapter: Adapter | None = None
    ) -> Job:
        """Check, tokenize and compile, without touching the engine. Raises ValueError.

        A `streamed` job, and whatever runs beside it, gets its tokens one by one.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}; it must be SamplingParams")
        if self.classifier is not None:
            raise ValueError("the model is a classifier, which continues no text; use classify (POST /classify)")
        asked = read_prompt(prompt)
        given = self._truncated(self._token_ids(asked), params)
        ids, limit = self.engine.check_request(given, params)
        if asked.kv_transfer_params:
            if self.exchange is None:
                raise ValueError("kv_transfer_params need an engine with kv_transfer_config; leave them out")
            self.exchange.check(asked.kv_transfer_params)
        constraint = all_of([self._form(params), self._rules(params)])
        if params.prompt_logprobs is not None:
            self.scorer.check(ids)
        warnings = constraint.warnings if constraint is not None else ()
        output = RequestOutput("", asked.text, ids, warnings=warnings)
        return Job(self, output, params, limit, asked, constraint, streamed, adapter)

    def _truncated(self, ids: Any, params: SamplingParams) -> Any:
        """The prompt's end, as much as `truncate_prompt_tokens` leaves of it."""
        if (most := params.truncate_prompt_tokens) is None:
            return ids
        if most < 0:
            most = max(1, self.engine.runner.shapes.max_model_len - (params.max_tokens or 1))
        return as_token_ids(ids)[-most:]

    def _form(self, params: SamplingParams) -> CopiedConstraint | None:
        if params.structured_outputs is None:
            return None
        self.tokenizer  # noqa: B018  (refuses, where there is none)
        assert self._grammars is not None and not isinstance(params.structured_outputs, dict)
        return self._grammars.compile(params.structured_outputs)

    def _rules(self, params: SamplingParams) -> CopiedConstraint | None:
        if not params.bad_words and not params.allowed_token_ids:
            return None
        vocab_size = self.engine.runner.model.cfg.vocab_size
        return token_rules(vocab_size, allowed=params.allowed_token_ids or (), banned=self._banned(params))

    def _banned(self, params: SamplingParams) -> list[list[int]]:
        """The words as tokens, at the beginning of a text and after a space."""
        words = [prefix + word.lstrip() for word in params.bad_words or () for prefix in ("", " ")]
        if not words:
            return []
        encoded = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
        return [ids for ids in encoded if ids]

    def token_ids(self, prompt: Any) -> list[int]:
        """A prompt's token ids, checked. Raises ValueError."""
        return self.engine.check_prompt(self._token_ids(read_prompt(prompt)))

    def _token_ids(self, asked: Asked) -> Any:
        if asked.token_ids is not None:
            return asked.token_ids
        assert asked.text is not None
        return self.tokenizer.encode(asked.text, add_special_tokens=asked.add_special_tokens)

    def refused(self, text: str | None, params: SamplingParams, error: ValueError) -> Job:
        """A job that ended before it began."""
        return Job(self, RequestOutput("", text, [], finished=True, error=str(error)), params, error=error)

    def attach_scores(self, job: Job, scores: ScoringPass) -> None:
        """Put a finished pass into the output; the first token has no probability."""
        ids, count = job.output.prompt_token_ids, job.params.prompt_logprobs or 0
        entries: list[Any] = []
        for sampled in scores.scored:
            known = len(sampled.tokens)
            targets = ids[len(entries) + 1 : len(entries) + 1 + known]
            entries += [logprob_entry(token, sampled, i, count, self.token_text) for i, token in enumerate(targets)]
        job.output.prompt_logprobs = [None, *entries]

    def queue(self, job: Job) -> None:
        """Make a job's requests, one for each completion, and queue them. Raises ValueError where a name is taken."""
        if not job.requests:  # else this was cut off half-way
            builders = [self._builder(job, index) for index in range(job.params.n)]
            requests = [self._request(job, builder) for builder in builders]
            for request in requests[1:]:
                request.parent = requests[0]
            if self.exchange is not None and job.asked is not None and job.asked.kv_transfer_params:
                self.exchange.attach(requests[0], job.asked.kv_transfer_params, job.output)
            job.output.outputs = [builder.output for builder in builders]
            job.output.request_id = requests[0].request_id
            job.requests = requests  # known before the engine has them: whatever happens, they can be taken back
        for request in job.requests:
            self.engine.add(request)

    def _builder(self, job: Job, index: int) -> CompletionBuilder:
        params, tokenizer = job.params, self._tokenizer if job.params.detokenize else None
        if tokenizer is None:
            return CompletionBuilder(index, params, None)
        skip, kept = params.skip_special_tokens, params.kept_special_tokens
        make_stream = functools.partial(tokenizer.detokenizer, skip_special_tokens=skip, kept=kept)
        return CompletionBuilder(index, params, make_stream, tokenizer.token_text)

    def _request(self, job: Job, builder: CompletionBuilder) -> Request:
        params, asked, name = job.params, job.asked, job.request_id
        assert asked is not None
        index = builder.output.index
        return self.engine.make_request(
            job.output.prompt_token_ids,
            params,
            job.limit,
            request_id=name if index == 0 or name is None else f"{name}-{index}",
            seed=None if params.seed is None else params.seed + index,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            constraint=job.constraint.copy() if job.constraint is not None else None,
            streamed=job.streamed,
            adapter=job.adapter,
            listener=_Completion(job, builder),
        )


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling values that a model's generation config asks for."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {n: v for n in names if (v := generation_config.get(n)) is not None}
    if generation_config.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return chosen
