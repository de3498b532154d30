"""`LLM`: the offline face. Prompts in, `RequestOutput`s out, in input order.

Joins engine (tokens) and tokenizer (text). Knows nothing of devices, pages or schedules.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.engine.build import build_engine
from jaxllm.engine.engine import NewTokens
from jaxllm.engine.outputs import CompletionBuilder, RequestOutput
from jaxllm.engine.request import Request
from jaxllm.engine.sampling_params import SamplingParams

Prompt = str | Mapping[str, Any]


@dataclass(slots=True)
class _Job:
    """One prompt on its way: its requests (one per completion) and what has come of them."""

    output: RequestOutput
    params: SamplingParams
    requests: list[Request]
    builders: dict[str, CompletionBuilder]
    started: float
    first_token: float | None = None


class LLM:
    """A model ready to generate.

    Args:
        model: a short name, a folder, a `.gguf` file or a Hugging Face id; the default is a small real model.
        use_tqdm: progress bars on a terminal.
        **kwargs: the fields of `EngineConfig`.

    Raises:
        ValueError: in one line, what cannot be done and what to do instead.
    """

    def __init__(self, model: str | None = None, *, use_tqdm: bool = True, **kwargs: Any):
        if model is not None:
            kwargs["model"] = model
        self.config = EngineConfig.from_kwargs(kwargs)
        built = build_engine(self.config, progress=use_tqdm)
        self.engine, self._tokenizer, self.model_config = built.engine, built.tokenizer, built.model_config
        self._generation_config = built.generation_config
        self.after_step: Callable[[], None] | None = None  # what it raises ends the call that is running

    def get_tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer (skip_tokenizer_init=True); give prompt_token_ids")
        return self._tokenizer

    def generation_defaults(self) -> dict[str, Any]:
        """Sampling values that the model's own generation config asks for."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        chosen = {n: v for n in names if (v := self._generation_config.get(n)) is not None}
        if self._generation_config.get("do_sample") is False:
            chosen["temperature"] = 0.0
        return chosen

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none."""
        return SamplingParams(**self.generation_defaults())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Complete every prompt.

        Args:
            prompts: text, or `{"prompt_token_ids": [...]}`; each may carry `cache_salt` and `priority`.
            sampling_params: one for all, or one per prompt; the model's own defaults when None.
            use_tqdm: a progress bar when standard error is a terminal.
            return_errors: report a bad prompt in its output's `error` and run the others, instead of raising
                before anything runs.

        Returns:
            One `RequestOutput` per prompt, in input order.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(prompts, sampling_params)
        jobs: list[_Job] = []
        try:
            for prompt, p in zip(prompts, params, strict=True):
                jobs.append(self._submit(prompt, p, return_errors))
            for _ in self._run(jobs, use_tqdm):
                pass
        finally:  # Ctrl-C or a refused prompt: nothing may stay behind in the engine
            for job in jobs:
                self._abort(job)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompts = [self.chat_prompt(c, tools=tools, add_generation_prompt=add_generation_prompt) for c in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Any, **kwargs: Any) -> dict[str, Any]:
        """A conversation as a prompt."""
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(messages, **kwargs)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the first completion's text as it grows. Leaving the loop aborts the request."""
        (params,) = self._params_for([prompt], sampling_params)
        job = self._submit(prompt, params, return_errors=False)
        builder, sent = next(iter(job.builders.values())), 0
        try:
            for _ in self._run([job], use_tqdm=False):
                if len(text := builder.stable_text) > sent:
                    yield text[sent:]
                    sent = len(text)
        finally:
            self._abort(job)

    def _params_for(self, prompts: Sequence[Prompt], params: Any) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each")
        return list(params)

    def _submit(self, prompt: Prompt, params: SamplingParams, return_errors: bool) -> _Job:
        output = RequestOutput("", None, [])
        job = _Job(output, params, [], {}, time.perf_counter())
        try:
            fields = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            output.prompt, output.prompt_token_ids = self._tokenize(fields)
            extra = {k: fields[k] for k in ("cache_salt", "priority") if k in fields}
            for index in range(params.n):
                self._add(job, index, extra)
        except ValueError as error:
            self._abort(job)
            if not return_errors:
                raise
            output.error, output.finished, output.outputs = str(error), True, []
        return job

    def _add(self, job: _Job, index: int, extra: dict[str, Any]) -> None:
        params = job.params
        request = self.engine.add_request(job.output.prompt_token_ids, params, **extra)
        if index and params.seed is not None:
            request.seed = params.seed + index
        job.requests.append(request)
        job.output.request_id = job.output.request_id or request.request_id
        tokenizer = self._tokenizer if params.detokenize else None
        stream = tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens) if tokenizer else None
        builder = CompletionBuilder(index, params, stream, tokenizer.token_text if tokenizer else None)
        job.builders[request.request_id] = builder
        job.output.outputs.append(builder.output)

    def _tokenize(self, fields: Mapping[str, Any]) -> tuple[str | None, list[int]]:
        text, ids = fields.get("prompt"), fields.get("prompt_token_ids")
        if ids is None:
            if not isinstance(text, str):
                raise ValueError("a prompt must be text or {'prompt_token_ids': [...]}")
            if not text:
                raise ValueError("the prompt is empty; give at least one character")
            ids = self.get_tokenizer().encode(text)
        return text, list(ids)

    def _run(self, jobs: Sequence[_Job], use_tqdm: bool) -> Iterator[None]:
        """Step the engine until these jobs are finished, yielding after each step."""
        owners = {request.request_id: job for job in jobs for request in job.requests}
        with _progress(len(jobs), use_tqdm) as bar:
            bar.update(sum(job.output.finished for job in jobs))
            while any(not job.output.finished for job in jobs):
                for news in self.engine.step():
                    job = owners.get(news.request.request_id)
                    if job is not None and self._deliver(job, news):
                        bar.update(1)
                if self.after_step is not None:
                    self.after_step()
                yield

    def _deliver(self, job: _Job, news: NewTokens) -> bool:
        """Hand new tokens to their completion; True when that finishes the job."""
        now, request = time.perf_counter(), news.request
        if job.first_token is None:
            job.first_token = now
            job.output.num_cached_tokens = request.num_cached or 0
        builder = job.builders[request.request_id]
        stop = builder.append(news.tokens, news.sampled)
        if stop is not None:
            self.engine.finish(request, "stop", stop)
        if request.finished:
            builder.finish(request.finish_reason or "abort", request.stop_reason)
        if not all(r.finished for r in job.requests) or job.output.finished:
            return False
        job.output.finished = True
        job.output.metrics = {
            "ttft_s": job.first_token - job.started,
            "latency_s": now - job.started,
            "num_preemptions": float(sum(r.num_preemptions for r in job.requests)),
        }
        return True

    def _abort(self, job: _Job) -> None:
        for request in job.requests:
            self.engine.abort(request.request_id)


def _progress(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="prompt", disable=not (enabled and sys.stderr.isatty()))
