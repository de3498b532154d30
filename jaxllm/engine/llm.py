"""`LLM`: the offline face. Prompts in, `RequestOutput`s out, in input order.

Steps the engine on the caller's thread. Knows nothing of devices, pages or schedules.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.decoding.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from jaxllm.engine.build import build_engine
from jaxllm.engine.completions import Job, Jobs, Prompt, sampling_defaults
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.scoring import Scorer
from jaxllm.telemetry import figures
from jaxllm.telemetry.device_peaks import measured_ceilings


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
        self.engine, self.model_config = built.engine, built.model_config
        self._jobs = Jobs(built.engine, built.tokenizer)
        self._scorer = Scorer(built.engine)
        self._generation_config = built.generation_config
        self.after_step: Callable[[], None] | None = None  # what it raises ends the call that is running

    def get_tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        return self._jobs.tokenizer

    def generation_defaults(self) -> dict[str, Any]:
        """Sampling values that the model's own generation config asks for."""
        return sampling_defaults(self._generation_config)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none."""
        return SamplingParams(**self.generation_defaults())

    def get_metrics(self) -> dict[str, Any]:
        """Queues, cache, totals and recent rates; see `jaxllm.telemetry.figures`.

        Where the devices are in no data sheet (a CPU, say) the first call measures them, in under a second, so
        that `mfu` and `mbu` mean something.
        """
        accounting = self.engine.accounting
        if accounting.ceilings is None:
            accounting.ceilings = measured_ceilings(self.engine.runner.model)
        return figures.get_metrics(self.engine)

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
        jobs: list[Job] = []
        try:
            for prompt, p in zip(prompts, params, strict=True):
                jobs.append(self._submit(prompt, p, return_errors=return_errors))
            for _ in self._run(jobs, use_tqdm):
                pass
        finally:  # Ctrl-C or a refused prompt: nothing may stay behind in the engine
            for job in jobs:
                self._jobs.abort(job)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template.

        Args:
            messages: one conversation, or a list of them.
            sampling_params: for all of them; the model's own defaults when None.
            use_tqdm: a progress bar when standard error is a terminal.
            tools: functions that the model may call, as OpenAI clients describe them.
            add_generation_prompt: end the prompt where an answer begins; None: unless the last message continues.
            continue_final_message: go on with the last message's text.
            chat_template_kwargs: variables of the template, over the engine's own defaults.
        """
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        given: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        given |= {"continue_final_message": continue_final_message, "chat_template_kwargs": chat_template_kwargs}
        prompts = [self.chat_prompt(conversation, **given) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def chat_prompt(self, messages: Any, **kwargs: Any) -> dict[str, Any]:
        """A conversation as a prompt; see `Tokenizer.chat_prompt`."""
        return self.get_tokenizer().chat_prompt(messages, **kwargs)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the first completion's text as it grows. Leaving the loop aborts the request."""
        (params,) = self._params_for([prompt], sampling_params)
        job = self._submit(prompt, params, streamed=True)
        builder, sent = next(iter(job.builders.values())), 0
        try:
            for _ in self._run([job], use_tqdm=False):
                if len(text := builder.stable_text) > sent:
                    yield text[sent:]
                    sent = len(text)
        finally:
            self._jobs.abort(job)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt.

        Args:
            prompts: text, or `{"prompt_token_ids": [...]}`.
            params: width, length and how to score.
            use_tqdm: a progress bar when standard error is a terminal.

        Returns:
            One `BeamSearchOutput` per prompt, in input order: `sequences`, best first, whose `tokens` and `text`
            begin with the prompt.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        searches: list[BeamSearch] = []
        try:
            for ids in [self._jobs.token_ids(prompt) for prompt in prompts]:
                searches.append(BeamSearch(self.engine, ids, params, self._jobs.token_text))
            with _progress(len(searches), use_tqdm) as bar:
                while any(not search.finished for search in searches):
                    for news in self.engine.step():
                        for search in searches:
                            search.feed(news)
                    bar.update(sum(search.finished for search in searches) - bar.n)
                    if self.after_step is not None:
                        self.after_step()
        finally:
            for search in searches:
                search.abort()
        return [BeamSearchOutput([self._with_text(s, params) for s in search.best()]) for search in searches]

    def _with_text(self, sequence: BeamSearchSequence, params: BeamSearchParams) -> BeamSearchSequence:
        if not self.config.skip_tokenizer_init:
            ended = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
            sequence.text = self.get_tokenizer().decode(sequence.tokens[:-1] if ended else sequence.tokens)
        return sequence

    def _params_for(self, prompts: Sequence[Prompt], params: Any) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each")
        return list(params)

    def _submit(
        self, prompt: Prompt, params: SamplingParams, *, return_errors: bool = False, streamed: bool = False
    ) -> Job:
        try:
            job = self._jobs.prepare(prompt, params)
            job.extra["streamed"] = streamed
            for text in job.output.warnings:
                warnings.warn(text, stacklevel=4)
            self._score_prompt(job)
            self._jobs.start(job)
        except ValueError as error:
            if not return_errors:
                raise
            text = prompt if isinstance(prompt, str) else prompt.get("prompt")
            job = Job(RequestOutput("", text, [], finished=True, error=str(error)), params)
        return job

    def _score_prompt(self, job: Job) -> None:
        if (scores := self._jobs.scoring_pass(job)) is None:
            return
        self._scorer.check(scores.token_ids)
        self._scorer.add(scores)
        while not scores.done:
            self._scorer.step()
        self._jobs.attach_scores(job, scores)

    def _run(self, jobs: Sequence[Job], use_tqdm: bool) -> Iterator[None]:
        """Step the engine until these jobs are finished, yielding after each step."""
        with _progress(len(jobs), use_tqdm) as bar:
            bar.update(sum(job.output.finished for job in jobs))
            while any(not job.output.finished for job in jobs):
                for news in self.engine.step():
                    delivered = self._jobs.deliver(news)
                    if delivered is not None and delivered[0].output.finished:
                        bar.update(1)
                if self.after_step is not None:
                    self.after_step()
                yield


def _progress(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="prompt", disable=not (enabled and sys.stderr.isatty()))
