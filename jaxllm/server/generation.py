"""One HTTP request's generation: opens a stream on the engine, times it, counts it, ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from jaxllm.adapters.store import UnknownAdapter
from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.outputs import CompletionDelta, CompletionOutput, RequestOutput
from jaxllm.entrypoints.async_llm import Stream
from jaxllm.server.context import Context
from jaxllm.server.errors import ApiError

News = list[tuple[int, CompletionDelta]]


class Generation:
    """Iterate over lists of `(prompt index, delta)`; `close` in any case.

    Iterating raises TimeoutError when the request takes too long.
    """

    def __init__(self, ctx: Context, stream: Stream, n: int):
        self.outputs: list[RequestOutput] = stream.outputs
        self.num_generated = 0
        self._ctx, self._stream, self._n = ctx, stream, n
        self._started = time.perf_counter()
        self._timer = asyncio.get_running_loop().call_later(ctx.settings.request_timeout, stream.fail, TimeoutError())
        self._last: dict[tuple[int, int], float] = {}
        self._unfinished = len(stream.outputs) * n

    @classmethod
    async def open(
        cls, ctx: Context, prompts: Sequence[Any], params: SamplingParams, request_id: str, *, streamed: bool
    ) -> Generation:
        """Start; see `AsyncLLM.open` for what is raised."""
        try:
            stream = await ctx.llm.open(prompts, params, request_id, streamed=streamed, lora_request=ctx.adapter)
        except UnknownAdapter as error:  # it has gone in the meantime
            raise ApiError(404, str(error), param="model", code="model_not_found") from None
        generation = cls(ctx, stream, params.n)
        for output in generation.outputs:
            ctx.metrics.asked(len(output.prompt_token_ids))
        return generation

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> News:
        news = await self._stream.__anext__()
        self._observe(news)
        return news

    async def collect(self) -> list[list[CompletionOutput]]:
        """Everything, per prompt and completion."""
        try:
            async for _ in self:
                pass
        finally:
            self.close()
        return [output.outputs for output in self.outputs]

    def close(self) -> None:
        """Free what it holds; unfinished requests count as aborted."""
        self._timer.cancel()
        self._stream.cancel()
        if self._unfinished:
            self._ctx.metrics.finished("abort", self._unfinished)
            self._unfinished = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def handed_over(self) -> dict[str, Any]:
        """Where another server may go on, as vLLM's answers say it; nothing where nobody asked."""
        params = self.outputs[0].kv_transfer_params if len(self.outputs) == 1 else None
        return {"kv_transfer_params": params} if params else {}

    def usage(self, num_reasoning: int = 0) -> dict[str, Any]:
        """OpenAI's usage object, of what has been generated so far."""
        prompt, generated = self.num_prompt_tokens, self.num_generated
        cached = sum(output.num_cached_tokens for output in self.outputs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        }

    def _observe(self, news: News) -> None:
        now, metrics = time.perf_counter(), self._ctx.metrics
        for prompt, delta in news:
            count, key = len(delta.token_ids), (prompt, delta.index)
            self.num_generated += count
            if (last := self._last.get(key)) is None:
                metrics.first_token(now - self._started)
            elif count:
                metrics.inter_token((now - last) / count, count)
            self._last[key] = now
            if delta.finish_reason is not None:
                self._unfinished -= 1
                metrics.finished(delta.finish_reason)
                metrics.latency(now - self._started)
                metrics.answered(len(self.outputs[prompt].outputs[delta.index].token_ids))
