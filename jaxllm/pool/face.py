"""A pool as a server's process sees it: whether it is well, how much is under way, and its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, final

from jaxllm.pool.driver import Driver
from jaxllm.pool.pool import Pool

if TYPE_CHECKING:
    from jaxllm.entrypoints.async_llm import AsyncLLM


@final
class PoolFace:
    """What `AsyncLLM` is to a server of one model, as far as no model in particular is meant."""

    exchange: Any = None  # pools hand no requests to other engines
    warm_up: Any = None  # each model has its own, before it is ready

    def __init__(self, pool: Pool, stuck_seconds: float = 30.0):
        self.pool = pool
        self._stuck_seconds = stuck_seconds
        self._draining = False

    @property
    def thread(self) -> Driver:
        """Who steps the engines."""
        return self.pool.driver

    @property
    def config(self) -> Any:
        """Of the pool and its models."""
        return self.pool.config, [model.config for model in self.pool.models]

    @property
    def llms(self) -> list[AsyncLLM]:
        """The frontends of models that are ready."""
        return [model.llm for model in self.pool.models if model.llm is not None]

    @property
    def num_open(self) -> int:
        """Requests accepted and unfinished."""
        return sum(llm.num_open for llm in self.llms)

    def unavailable(self) -> str | None:
        """Why no request would be taken, or None."""
        if not self.pool.driver.is_alive:
            return "the engine is dead"
        stalled = self.pool.driver.stalled_seconds
        if stalled > self._stuck_seconds and any(model.has_work for model in self.pool.models):
            return f"the engine has made no progress for {stalled:.0f} s while work is pending"
        return "the server is shutting down" if self._draining else None

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait for those under way; False when the time was not enough."""
        self._draining = True
        waits = [llm.drain(timeout) for llm in self.llms]
        return all(await asyncio.gather(*waits)) if waits else True

    def fail_all(self, message: str) -> None:
        """End every stream with an error."""
        for llm in self.llms:
            llm.fail_all(message)

    def shutdown(self) -> None:
        """End everything."""
        self.pool.close()
