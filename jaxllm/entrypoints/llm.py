"""`LLM`: the offline API. Prompts in, `RequestOutput`s out, in input order.

Steps the engine on the caller's thread. Calls may come from several threads, streams may be open beside other calls,
and any call may be interrupted: what others have started goes on. Knows nothing of devices, pages or schedules.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

from jaxllm.adapters.lora_request import LoRARequest
from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.completions import Job
from jaxllm.engine.errors import EngineError
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.prompts import Prompt, as_prompts, text_of
from jaxllm.engine.relevance import ClassificationRequestOutput, Judge, ScoringRequestOutput, text_pairs
from jaxllm.engine.scoring import ScoringPass
from jaxllm.engine.work import Work
from jaxllm.entrypoints.exclusive import Call, Exclusive
from jaxllm.entrypoints.frontend import Frontend
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.telemetry import figures
from jaxllm.telemetry.device_peaks import measured_ceilings

if TYPE_CHECKING:
    from jaxllm.decoding.beam_search import BeamSearchOutput, BeamSearchParams

Adapters = LoRARequest | str | None | Sequence[LoRARequest | str | None]
_BUSY_SECONDS = 10.0  # for a step of another thread
_TURN_SECONDS = 0.0001  # between steps while other calls are open: their thread may want the lock


class LLM(Frontend):
    """A model ready to generate; see `Frontend` for the arguments.

    A call that raises in the middle of its work ends itself alone. Where the engine cannot be brought back to a
    sound state every call raises `EngineError`.
    """

    def __init__(self, model: str | None = None, *, use_tqdm: bool = True, **kwargs: Any):
        super().__init__(model, use_tqdm=use_tqdm, **kwargs)
        self._exclusive = Exclusive(self._jobs)
        self.after_step: Callable[[], None] | None = None  # what it raises ends the call that is running
        self.at_exit(self.close)

    @property
    def is_stepping(self) -> bool:
        """Whether the thread that asks (a signal handler, say) is inside a step of the engine."""
        return self._exclusive.is_inside

    def close(self) -> None:
        """End what is unfinished, and write cached prefixes to the disk tier, if there is one, for 10 s at most.

        `with LLM(...) as llm:` and the interpreter's end do it, too. May be repeated, also after an interrupt: the next
        call goes on.
        """
        self._exclusive.run_last(self.save_cache, _BUSY_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        lora_request: Adapters = None,
    ) -> list[RequestOutput]:
        """Complete every prompt.

        Args:
            prompts: text, token ids (a list or an array), or `{"prompt_token_ids": [...]}`, which may carry
                `cache_salt` and `priority`; or several of them.
            sampling_params: one for all, or one per prompt; the model's own defaults when None.
            use_tqdm: a progress bar when standard error is a terminal.
            return_errors: report a bad prompt in its output's `error` and run the others, instead of raising
                before anything runs.
            lora_request: an adapter for all prompts, or for each one or None: a `LoRARequest`, or a served name.

        Returns:
            One `RequestOutput` per prompt, in input order. `error` says why one has no answer, or only half of it.
        """
        given = as_prompts(prompts)
        params = self._params_for(given, sampling_params)
        adapters = self._adapters_for(given, lora_request)
        jobs = [self._prepare(*one, return_errors) for one in zip(given, params, adapters, strict=True)]
        for text in dict.fromkeys(text for job in jobs for text in job.output.warnings):
            warnings.warn(text, stacklevel=2)
        call = self._exclusive.open()
        try:
            call.works += [job for job in jobs if not job.finished]
            self._run(call, use_tqdm)
        finally:  # Ctrl-C, say: nothing may stay behind in the engine
            self._exclusive.close(call)
        return [job.output for job in jobs]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: Adapters = None,
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
            lora_request: as for `generate`.
        """
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        given: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        given |= {"continue_final_message": continue_final_message, "chat_template_kwargs": chat_template_kwargs}
        prompts = [self.chat_prompt(conversation, **given) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> Iterator[str]:
        """Yield the first completion's text as it grows. Leaving the loop aborts the request.

        Other calls may run between two pieces; they carry this request on.

        Raises:
            ValueError: the prompt is refused, or (in the end) the request has no proper answer.
        """
        (params,) = self._params_for([prompt], sampling_params)
        call = self._exclusive.open()
        try:
            job = self._jobs.prepare(prompt, params, streamed=True, adapter=self.adapter_of(lora_request))
            for text in job.output.warnings:
                warnings.warn(text, stacklevel=2)
            call.works.append(job)
            sent = 0
            for _ in self._steps(call):
                text = job.output.outputs[0].text if job.output.outputs else ""
                if len(text) > sent:
                    piece, sent = text[sent:], len(text)
                    yield piece
            if job.error is not None:
                raise job.error
        finally:
            self._exclusive.close(call)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt.

        Args:
            prompts: as for `generate`.
            params: width, length and how to score.
            use_tqdm: a progress bar when standard error is a terminal.

        Returns:
            One `BeamSearchOutput` per prompt, in input order: `sequences`, best first, whose `tokens` and `text`
            begin with the prompt.
        """
        from jaxllm.decoding.beam_search import BeamSearch

        searches = [BeamSearch.of(self._jobs, prompt, params) for prompt in as_prompts(prompts)]
        call = self._exclusive.open()
        try:
            call.works += searches
            self._run(call, use_tqdm)
        finally:
            self._exclusive.close(call)
        return [search.result() for search in searches]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        use_activation: bool = True,
        lora_request: Adapters = None,
    ) -> list[ClassificationRequestOutput]:
        """The classes of every text, where the model is a classifier.

        Args:
            prompts: as for `generate`.
            use_tqdm: a progress bar when standard error is a terminal.
            use_activation: probabilities; else the head's own numbers.
            lora_request: as for `generate`.
        """
        judge, given = Judge(self._jobs), as_prompts(prompts)
        adapters = self._adapters_for(given, lora_request)
        works = [judge.classify(*one) for one in zip(given, adapters, strict=True)]
        self._judge(works, use_tqdm)
        return [judge.classes(work, use_activation=use_activation) for work in works]

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        use_tqdm: bool = True,
        instruction: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts answer a query: a score from 0 to 1 for each pair.

        Args:
            data_1: one query, or one for each text.
            data_2: texts.
            use_tqdm: a progress bar when standard error is a terminal.
            instruction: what relevance means, for models that are asked in words.
        """
        judge = Judge(self._jobs)
        works = [judge.pair(query, text, instruction) for query, text in text_pairs(data_1, data_2)]
        self._judge(works, use_tqdm)
        return [judge.score(work) for work in works]

    def _judge(self, works: Sequence[ScoringPass], use_tqdm: bool) -> None:
        call = self._exclusive.open()
        try:
            call.works += works
            self._run(call, use_tqdm)
        finally:
            self._exclusive.close(call)
        if (error := next((work.error for work in works if work.error is not None), None)) is not None:
            raise error

    def _params_for(self, prompts: Sequence[Any], params: Any) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if not isinstance(params, Sequence):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each")
        return list(params)

    def _adapters_for(self, prompts: Sequence[Any], asked: Adapters) -> list[Adapter | None]:
        if not isinstance(asked, list | tuple):
            return [self.adapter_of(cast("LoRARequest | str | None", asked))] * len(prompts)
        if len(asked) != len(prompts):
            raise ValueError(f"{len(asked)} lora_requests for {len(prompts)} prompts; give one, or one for each")
        return [self.adapter_of(one) for one in asked]

    def _prepare(self, prompt: Any, params: SamplingParams, adapter: Adapter | None, return_errors: bool) -> Job:
        try:
            return self._jobs.prepare(prompt, params, adapter=adapter)
        except ValueError as error:
            if not return_errors:
                raise
            return self._jobs.refused(text_of(prompt), params, error)

    def _run(self, call: Call, use_tqdm: bool) -> None:
        with _progress(len(call.works), use_tqdm) as bar:
            for num_finished in self._steps(call):
                bar.update(num_finished - bar.n)

    def _steps(self, call: Call) -> Iterator[int]:
        """Start a call's work and step the engine until all of it is finished; yields how many are, each time."""
        works: list[Work] = list(call.works)
        self._exclusive.run(lambda: [work.start() for work in works])
        total, works = len(works), works[::-1]
        while True:
            while works and works[-1].finished:
                works.pop()
            if not works:
                yield total
                return
            yield total - len(works)
            self._exclusive.run(lambda: self._step(works[-1]))
            if self.after_step is not None:
                self.after_step()
            if self._exclusive.is_shared:
                time.sleep(_TURN_SECONDS)

    def _step(self, work: Work) -> None:
        if work.finished:
            return  # another call's step has finished it
        if not self._jobs.has_work:
            raise EngineError("the engine has lost a request: please report this")
        self._jobs.step()


def _progress(total: int, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="prompt", disable=not (enabled and sys.stderr.isatty()))
