"""Prompts into engine requests, engine tokens into outputs: what `LLM` and `AsyncLLM` share.

Joins engine (tokens) and tokenizer (text). Knows nothing of threads, event loops or protocols.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.constraints import GrammarCompiler
from jaxllm.engine.outputs import CompletionBuilder, RequestOutput, logprob_entry
from jaxllm.engine.scoring import ScoringPass
from jaxllm.engine.token_rules import CopiedConstraint, all_of, token_rules
from jaxllm.scheduling.request import Request

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine, NewTokens
    from jaxllm.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]


@dataclass(slots=True, eq=False)
class Job:
    """One prompt on its way: its requests (one per completion) and what has come of them."""

    output: RequestOutput
    params: SamplingParams
    extra: dict[str, Any] = field(default_factory=dict)
    constraint: CopiedConstraint | None = None
    requests: list[Request] = field(default_factory=list)
    builders: dict[str, CompletionBuilder] = field(default_factory=dict)
    created: float = field(default_factory=time.perf_counter)
    first_token: float | None = None


class Jobs:
    """Starts, feeds and ends jobs on one engine.

    `prepare` may run on any thread; everything else belongs to the thread that steps the engine.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None):
        self._engine = engine
        self._tokenizer = tokenizer
        self._owners: dict[str, Job] = {}
        vocab_size = engine.runner.model.cfg.vocab_size
        self._grammars = GrammarCompiler(tokenizer, vocab_size, engine.eos_token_ids) if tokenizer else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True); give prompt_token_ids")
        return self._tokenizer

    def prepare(self, prompt: Prompt, params: SamplingParams) -> Job:
        """Tokenize and compile, without touching the engine. Raises ValueError."""
        fields = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        text, ids = self._tokenize(fields)
        ids = self._truncated(ids, params)
        self._engine.check_request(ids, params)
        extra = {k: fields[k] for k in ("cache_salt", "priority") if k in fields}
        constraint = all_of([self._form(params), self._rules(params)])
        warnings = constraint.warnings if constraint is not None else ()
        return Job(RequestOutput("", text, ids, warnings=warnings), params, extra, constraint)

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt's end, as much as `truncate_prompt_tokens` leaves of it."""
        if (most := params.truncate_prompt_tokens) is None:
            return ids
        if most < 0:
            most = max(1, self._engine.runner.shapes.max_model_len - (params.max_tokens or 1))
        return ids[-most:]

    def _form(self, params: SamplingParams) -> CopiedConstraint | None:
        if params.structured_outputs is None:
            return None
        self.tokenizer  # noqa: B018  (refuses, where there is none)
        assert self._grammars is not None and not isinstance(params.structured_outputs, dict)
        return self._grammars.compile(params.structured_outputs)

    def _rules(self, params: SamplingParams) -> CopiedConstraint | None:
        if not params.bad_words and not params.allowed_token_ids:
            return None
        vocab_size = self._engine.runner.model.cfg.vocab_size
        return token_rules(vocab_size, allowed=params.allowed_token_ids or (), banned=self._banned(params))

    def _banned(self, params: SamplingParams) -> list[list[int]]:
        """The words as tokens, at the beginning of a text and after a space."""
        words = [prefix + word.lstrip() for word in params.bad_words or () for prefix in ("", " ")]
        if not words:
            return []
        encoded = [self.tokenizer.encode(word, add_special_tokens=False) for word in words]
        return [ids for ids in encoded if ids]

    def _tokenize(self, fields: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise ValueError("a prompt must be text or {'prompt_token_ids': [...]}")
            if not text:
                raise ValueError("the prompt is empty; give at least one character")
            ids = self.tokenizer.encode(text)
        return text, list(ids)

    def token_ids(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids. Raises ValueError where it has none."""
        return self._tokenize({"prompt": prompt} if isinstance(prompt, str) else prompt)[1]

    @property
    def token_text(self) -> Any:
        """How one token reads, where there is a tokenizer."""
        return self._tokenizer.token_text if self._tokenizer else None

    def scoring_pass(self, job: Job) -> ScoringPass | None:
        """The pass that must run before `start`, for a job that asks for prompt logprobs."""
        if job.params.prompt_logprobs is None:
            return None
        return ScoringPass(job.output.prompt_token_ids)

    def attach_scores(self, job: Job, scores: ScoringPass) -> None:
        """Put a finished pass into the output; the first token has no probability."""
        ids, text = job.output.prompt_token_ids, self._tokenizer.token_text if self._tokenizer else None
        count, entries = job.params.prompt_logprobs or 0, []
        for sampled in scores.scored:
            known = len(sampled.tokens)
            targets = ids[len(entries) + 1 : len(entries) + 1 + known]
            entries += [logprob_entry(token, sampled, i, count, text) for i, token in enumerate(targets)]
        job.output.prompt_logprobs = [None, *entries]

    def start(self, job: Job, request_id: str | None = None) -> None:
        """Queue a prepared job's requests. Raises ValueError, and then nothing stays behind."""
        try:
            for index in range(job.params.n):
                self._add(job, index, request_id)
        except ValueError:
            self.abort(job)
            raise

    def _add(self, job: Job, index: int, request_id: str | None) -> None:
        params = job.params
        name = request_id if index == 0 or request_id is None else f"{request_id}-{index}"
        constraint = job.constraint.copy() if job.constraint is not None else None
        ids = job.output.prompt_token_ids
        parent = job.requests[0] if index else None
        request = self._engine.add_request(
            ids, params, request_id=name, constraint=constraint, parent=parent, **job.extra
        )
        if index and params.seed is not None:
            request.seed = params.seed + index
        job.requests.append(request)
        job.output.request_id = job.output.request_id or request.request_id
        tokenizer = self._tokenizer if params.detokenize else None
        skip, kept = params.skip_special_tokens, params.kept_special_tokens
        stream = tokenizer.detokenizer(skip_special_tokens=skip, kept=kept) if tokenizer else None
        builder = CompletionBuilder(index, params, stream, tokenizer.token_text if tokenizer else None)
        job.builders[request.request_id] = builder
        job.output.outputs.append(builder.output)
        self._owners[request.request_id] = job

    def deliver(self, news: NewTokens) -> tuple[Job, CompletionBuilder] | None:
        """Hand new tokens to their completion; None when nobody waits for them any more."""
        request = news.request
        if (job := self._owners.get(request.request_id)) is None:
            return None
        now = time.perf_counter()
        if job.first_token is None:
            job.first_token = now
            job.output.num_cached_tokens = request.num_cached or 0
        builder = job.builders[request.request_id]
        stop = builder.append(news.tokens, news.sampled)
        if stop is not None:
            self._engine.finish(request, "stop", stop)
        if request.finished:
            builder.finish(request.finish_reason or "abort", request.stop_reason)
            del self._owners[request.request_id]
            self._finish_if_done(job, now)
        return job, builder

    def _finish_if_done(self, job: Job, now: float) -> None:
        # By what was delivered: another of its requests may have ended in this step and still be on its way here.
        if any(completion.finish_reason is None for completion in job.output.outputs):
            return
        job.output.finished = True
        job.output.error = next((r.error for r in job.requests if r.error), None)
        job.output.metrics = {
            "ttft_s": (job.first_token or now) - job.created,
            "latency_s": now - job.created,
            "num_preemptions": float(sum(r.num_preemptions for r in job.requests)),
        }

    def abort(self, job: Job) -> None:
        """End a job now; one that is finished is left alone."""
        for request in job.requests:
            self._owners.pop(request.request_id, None)
            self._engine.abort(request.request_id)

    def owner(self, request: Request) -> Job | None:
        """The unfinished job that a request belongs to."""
        return self._owners.get(request.request_id)

    @property
    def unfinished(self) -> list[Job]:
        """Every job that is under way."""
        return list(dict.fromkeys(self._owners.values()))


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """Sampling values that a model's generation config asks for."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    chosen = {n: v for n in names if (v := generation_config.get(n)) is not None}
    if generation_config.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return chosen
