"""`AsyncLLM`: the engine for event loops. One thread steps it; every request is an async iterator.

Bounded: more requests than can run or queue are refused. Leaving or cancelling an iterator aborts its request and
frees its pages at the next iteration. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from jaxllm.adapters.lora_request import LoRARequest
from jaxllm.config.sampling import SamplingParams
from jaxllm.config.slo import parse_slo
from jaxllm.engine.completions import Job
from jaxllm.engine.errors import EngineError, Unavailable
from jaxllm.engine.outputs import CompletionDelta, CompletionOutput, RequestOutput, as_of
from jaxllm.engine.prompts import Prompt
from jaxllm.engine.relevance import ClassificationRequestOutput, Judge, ScoringRequestOutput, text_pairs
from jaxllm.engine.scoring import ScoringPass
from jaxllm.engine.work import Work
from jaxllm.entrypoints.admission import admission_of
from jaxllm.entrypoints.engine_thread import EngineThread
from jaxllm.entrypoints.frontend import Frontend
from jaxllm.entrypoints.tasks import Update
from jaxllm.entrypoints.warm_up import WarmUp
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.scheduling.pace import DEFAULT_SECONDS

if TYPE_CHECKING:
    from jaxllm.decoding.beam_search import BeamSearchOutput, BeamSearchParams

T = TypeVar("T")
_INLINE_CHARS = 2000  # shorter prompts are tokenized where they are: a thread would cost more
_PREPARE_SECONDS = 20.0
_HANDING_OVER_SECONDS = 0.05
_EMBEDDING_WINDOW = 8  # passes of one call that are queued at once


class Stream:
    """News of one or more prompts as they come: iterate over lists of `(prompt index, delta)`.

    Raises EngineError where the engine failed, ValueError where a prompt was refused. Call `cancel` when done.
    """

    def __init__(self, owner: AsyncLLM, outputs: list[RequestOutput], num_listeners: int, num_requests: int):
        self.outputs = outputs
        self.num_requests = num_requests
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._news: list[tuple[int, CompletionDelta]] = []
        self._error: Exception | None = None
        self._unfinished = num_listeners
        self._wake = asyncio.Event()
        self._listeners = [_Listener(self, index) for index in range(num_listeners)]

    @property
    def listeners(self) -> Sequence[_Listener]:
        """What the engine thread calls each prompt by."""
        return self._listeners

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where its news must be handed over."""
        return self._loop

    def take(self, index: int, update: Update) -> None:
        """Hand over news; on the stream's own loop."""
        if update.delta is not None:
            self._news.append((index, update.delta))
        if update.error is not None:
            self.fail(update.error)
        self._unfinished -= update.finished
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Let the iteration raise `error` after the news that are there, and at once if it waits."""
        self._error = self._error or error
        self._wake.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[tuple[int, CompletionDelta]]:
        while not self._news:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        news, self._news = self._news, []
        return news

    def cancel(self) -> None:
        """End whatever is unfinished and give the room back."""
        self._owner.close(self)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Listener:
    stream: Stream
    index: int


class Stepper(Protocol):
    """Who steps the engine, seen by those who want something of it; see `EngineThread`."""

    def submit(self, work: Work, listener: Any) -> None: ...
    def cancel(self, listener: Any) -> None: ...
    def call(self, function: Callable[[], T]) -> Future[T]: ...
    def measure_when_idle(self) -> None: ...
    def stop(self, timeout: float = 10.0) -> bool: ...
    @property
    def num_failures(self) -> int: ...
    @property
    def num_queued(self) -> int: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def stalled_seconds(self) -> float: ...


class AsyncLLM(Frontend):
    """A model ready to generate, for async code.

    Args:
        model: as for `LLM`.
        slo: `ttft:2s,tpot:100ms`: refuse what would miss it; see `jaxllm.entrypoints.admission`. Chunks of prompts
            beside streams are no larger than fit into `tpot`, by default 100 ms.
        max_num_queued_requests: requests that may wait beside those that run.
        stuck_seconds: without progress for so long, while there is work, the engine counts as stuck.
        before_step: a hook for tests that inject faults; called on the engine's thread.
        on_stage: told what is being done while the model is loaded.
        make_thread: who steps the engine; a pool has one thread for several.
        **kwargs: the fields of `EngineConfig`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        slo: str | None = None,
        max_num_queued_requests: int = 512,
        stuck_seconds: float = 30.0,
        before_step: Callable[[], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        use_tqdm: bool = True,
        make_thread: Callable[..., Stepper] = EngineThread,
        **kwargs: Any,
    ):
        super().__init__(model, use_tqdm=use_tqdm, on_stage=on_stage, **kwargs)
        self._capacity = self.engine.runner.shapes.spare_slot + max_num_queued_requests  # slots of all replicas
        self._stuck_seconds = stuck_seconds
        promised = parse_slo(slo)
        self.admission = admission_of(self.engine, promised)
        self.engine.pace.target = promised.get("tpot", DEFAULT_SECONDS)
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._streams: set[Stream] = set()
        self.warm_up: WarmUp | None = None  # where one goes on beside the requests
        self._draining = False
        self._paused: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.thread = make_thread(self._jobs, self._publish, before_step)
        self.at_exit(self.shutdown)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: LoRARequest | str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output as it grows, each time whole. Leaving the loop or cancelling aborts it.

        `lora_request` is an adapter to answer with, or the name of one that is served.

        Raises:
            ValueError: a bad prompt or bad parameters.
            Unavailable: no room.
            EngineError: the engine failed.
        """
        params = sampling_params or self.get_default_sampling_params()
        stream = await self.open([prompt], params, request_id, lora_request=lora_request)
        output = stream.outputs[0]
        try:
            parts = [CompletionOutput(index) for index in range(params.n)]
            async for news in stream:
                for _, delta in news:
                    parts[delta.index] = as_of(output.outputs[delta.index], delta)
                done = all(part.finish_reason for part in parts)
                yield dataclasses.replace(output, outputs=list(parts), finished=done)
        finally:
            stream.cancel()

    async def open(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        streamed: bool = True,
        lora_request: LoRARequest | str | None = None,
    ) -> Stream:
        """Start several prompts as one stream; either all are accepted or none. See `generate` for errors.

        With `streamed=False` nobody minds when tokens come several at a time, which spares the host work.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params is a {type(params).__name__}; it must be SamplingParams")
        if not isinstance(request_id, str | None):
            raise ValueError(f"request_id={request_id!r}; it must be text")
        self._check_room(len(prompts) * params.n)
        adapter = None if lora_request is None else await self.in_thread(self.adapter_of, lora_request)
        jobs = [await self._prepare(prompt, params, streamed, adapter) for prompt in prompts]
        for index, job in enumerate(jobs):
            job.request_id = request_id if request_id is None or len(jobs) == 1 else f"{request_id}-{index}"
        if self.admission is not None:
            self.admission.check(jobs)
        return self._start(jobs, len(prompts) * params.n, [job.output for job in jobs])

    def _start(self, works: Sequence[Work], num_requests: int, outputs: list[RequestOutput]) -> Stream:
        self._check_room(num_requests)  # others came in the meantime
        stream = self._opened(Stream(self, outputs, len(works), num_requests))
        for listener, work in zip(stream.listeners, works, strict=True):
            self.thread.submit(work, listener)
        return stream

    def _opened(self, stream: Stream) -> Stream:
        self._streams.add(stream)
        self._idle.clear()
        return stream

    async def beam_search(self, prompt: Prompt, params: BeamSearchParams) -> BeamSearchOutput:
        """The likeliest continuations of a prompt; see `LLM.beam_search`. Raises as `generate` does."""
        from jaxllm.decoding.beam_search import BeamSearch

        search = await self.in_thread(BeamSearch.of, self._jobs, prompt, params)
        await self._finish([search], params.beam_width)
        return search.result()

    async def classify(
        self, prompts: Sequence[Prompt], *, use_activation: bool = True, lora_request: LoRARequest | str | None = None
    ) -> list[ClassificationRequestOutput]:
        """The classes of every text; see `LLM.classify`."""
        judge = Judge(self._jobs)
        adapter = None if lora_request is None else await self.in_thread(self.adapter_of, lora_request)
        works = await self.in_thread(lambda: [judge.classify(prompt, adapter) for prompt in prompts])
        await self._judge(works)
        return [judge.classes(work, use_activation=use_activation) for work in works]

    async def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        instruction: str | None = None,
        lora_request: LoRARequest | str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts answer a query; see `LLM.score`."""
        judge, pairs = Judge(self._jobs), text_pairs(data_1, data_2)
        adapter = None if lora_request is None else await self.in_thread(self.adapter_of, lora_request)
        works = await self.in_thread(lambda: [judge.pair(*pair, instruction, adapter) for pair in pairs])
        await self._judge(works)
        return [judge.score(work) for work in works]

    async def _judge(self, works: Sequence[ScoringPass]) -> None:
        for start in range(0, len(works), _EMBEDDING_WINDOW):
            window = works[start : start + _EMBEDDING_WINDOW]
            await self._finish(window, len(window))

    async def embed(
        self, prompts: Sequence[Sequence[int]], pooling: str = "mean", *, lora_request: LoRARequest | str | None = None
    ) -> list[np.ndarray]:
        """One vector of unit length per prompt of token ids, from the final norm's output."""
        adapter = None if lora_request is None else await self.in_thread(self.adapter_of, lora_request)
        scorer = self._jobs.scorer
        passes = [ScoringPass(scorer, scorer.check(ids), pooling, adapter) for ids in prompts]
        for start in range(0, len(passes), _EMBEDDING_WINDOW):
            window = passes[start : start + _EMBEDDING_WINDOW]
            await self._finish(window, len(window))
        return [_unit(work.vector) for work in passes]

    async def _finish(self, works: Sequence[Work], num_requests: int) -> None:
        """Run work that has no news but its end."""
        stream = self._start(works, num_requests, [])
        try:
            async for _ in stream:
                pass
        finally:
            stream.cancel()

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run what may take long (a template, a tokenizer) beside the event loop, for a bounded time."""
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._pool, function, *args), _PREPARE_SECONDS)
        except TimeoutError:
            raise ValueError(f"preparing the prompt took more than {_PREPARE_SECONDS:g} s; simplify it") from None

    async def _prepare(self, prompt: Prompt, params: SamplingParams, streamed: bool, adapter: Adapter | None) -> Job:
        text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
        ready = isinstance(prompt, Mapping) and prompt.get("prompt_token_ids") is not None
        short = ready or not isinstance(text, str) or len(text) < _INLINE_CHARS
        prepare = functools.partial(self._jobs.prepare, prompt, params, streamed=streamed, adapter=adapter)
        if short and params.structured_outputs is None:
            return prepare()
        return await self.in_thread(prepare)

    def _check_room(self, num_requests: int) -> None:
        if num_requests > self._capacity:
            raise ValueError(
                f"{num_requests} completions in one request, but at most {self._capacity} can run or queue; "
                "send fewer prompts or lower n"
            )
        if (reason := self.unavailable() or self._paused) is not None:
            raise Unavailable(reason, retry_after=10)
        if self.num_open + num_requests > self._capacity:
            raise Unavailable(f"the queue is full ({self._capacity} requests run or wait)")

    @property
    def num_open(self) -> int:
        """Requests accepted and unfinished."""
        return sum(stream.num_requests for stream in self._streams)

    def unavailable(self) -> str | None:
        """Why no request would be taken, or None."""
        return self.unhealthy() or ("the server is shutting down" if self._draining else None)

    def unhealthy(self) -> str | None:
        """Why the engine cannot be relied on, or None."""
        if not self.thread.is_alive:
            return "the engine is dead"
        is_compiling = self.warm_up is not None and not self.warm_up.is_over
        if (stalled := self.thread.stalled_seconds) > self._stuck_seconds and not is_compiling:
            return f"the engine has made no progress for {stalled:.0f} s while work is pending"
        return None

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those under way; False when the time was not enough.

        Pages that others shall fetch are waited for, too.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
                while self.exchange is not None and len(self.exchange.exports):
                    await asyncio.sleep(_HANDING_OVER_SECONDS)
        except TimeoutError:
            return False
        return True

    async def pause(self, reason: str) -> None:
        """Refuse requests, with this reason, until `resume`; returns when those under way have ended."""
        self._paused = reason
        await self._idle.wait()

    def resume(self) -> None:
        """Take requests again."""
        self._paused = None

    def fail_all(self, message: str) -> None:
        """End every stream with an error (at the end of a drain, say)."""
        for stream in list(self._streams):
            for listener in stream.listeners:
                stream.take(listener.index, Update(listener, finished=True, error=EngineError(message)))

    def close(self, stream: Stream) -> None:
        """Cancel what is unfinished of a stream; see `Stream.cancel`."""
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        for listener in stream.listeners:
            self.thread.cancel(listener)
        if not self._streams:
            self._idle.set()

    def shutdown(self) -> None:
        """End the engine's thread; unfinished requests end with an error, and cached prefixes go to the disk tier."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.warm_up is not None:
            self.warm_up.stop()
        if self.thread.stop():
            self.save_cache()
        for part in (self.exchange, self.events):
            if part is not None:
                part.shutdown()

    def _publish(self, updates: list[Update]) -> None:
        """On the engine's thread: wake every loop once with all its news."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Update]] = {}
        for update in updates:
            by_loop.setdefault(update.listener.stream.loop, []).append(update)
        for loop, news in by_loop.items():
            try:
                loop.call_soon_threadsafe(_hand_over, news)
            except RuntimeError:  # the loop is closed: nobody listens any more
                for update in news:
                    self.thread.cancel(update.listener)


def _hand_over(updates: list[Update]) -> None:
    for update in updates:
        update.listener.stream.take(update.listener.index, update)


def _unit(vector: np.ndarray | None) -> np.ndarray:
    assert vector is not None, "the pass is not done"
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
