"""Sleep and wake of an engine that is alone: its weights and cache leave the devices while others need them."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection
from typing import Any, final

from jaxllm.engine.build import BuiltEngine, read_parameters
from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.pool.host_kv import HostKV
from jaxllm.pool.residence import Residence
from jaxllm.pool.weights import make_plain_store

TAGS = ("weights", "kv_cache")
_ASLEEP = "the model sleeps; POST /wake_up brings it back"


@final
class Sleeper:
    """Puts one engine to sleep, wakes it, and replaces its weights; calls come one after another."""

    def __init__(self, llm: AsyncLLM):
        self._llm, self._config = llm, llm.config
        self._lock = asyncio.Lock()
        self._residence: Residence | None = None

    @property
    def is_sleeping(self) -> bool:
        """Whether any part of it is off the devices."""
        residence = self._residence
        return residence is not None and not (residence.has_weights and residence.cache.is_here)

    async def sleep(self, level: int = 1) -> None:
        """Wait for the requests under way, take no more, and free the devices.

        Args:
            level: 1 keeps the weights in host memory (on a CPU that is the same memory: only the cache is freed);
                2 drops them, too, and reads them again from disk.
        """
        async with self._lock:
            await self._llm.pause(_ASLEEP)
            await self._between(lambda: self._put_to_sleep(level))

    async def wake_up(self, tags: Collection[str] = TAGS) -> None:
        """Bring parts back: `weights`, `kv_cache`; requests are taken again when both are there."""
        async with self._lock:
            await self._between(lambda: self._wake(tags))
            if not self.is_sleeping:
                self._llm.resume()

    async def update_weights(self, path: str) -> None:
        """Replace the weights by others of the same shapes: nothing is compiled, cached prefixes are forgotten.

        Requests under way go on with the new ones, from the tokens they have. Raises ValueError where they do not fit.
        """
        async with self._lock:
            if self.is_sleeping:
                raise ValueError("the model sleeps; POST /wake_up before its weights are replaced")
            if self._config.disk_kv_bytes:
                raise ValueError("weights cannot be replaced beside a KV cache on disk; start without disk_kv_bytes")
            config = dataclasses.replace(self._config, model=path)
            params = await asyncio.to_thread(read_parameters, config, self._built())
            await self._between(lambda: self._known().replace_weights(params))
            self._config = config

    async def _between(self, function: Callable[[], Any]) -> None:
        await asyncio.wrap_future(self._llm.thread.call(function))

    def _built(self) -> BuiltEngine:
        return BuiltEngine(self._llm.engine, None, self._llm.model_config, {})

    def _known(self) -> Residence:
        if self._residence is None:
            engine = self._llm.engine
            if engine.runner.model.placement.mesh.is_multi_process:
                raise ValueError("an engine of several processes can neither sleep nor change its weights")
            device = engine.runner.model.placement.mesh.devices.flat[0]
            nothing = HostKV(1, 1)  # cached prefixes go to the engine's own tiers, or are forgotten
            reread = lambda: read_parameters(self._config, self._built())
            self._residence = Residence(engine, make_plain_store(device), nothing, reread)
        return self._residence

    def _put_to_sleep(self, level: int) -> None:
        residence = self._known()
        if residence.has_weights:
            if level == 1:
                residence.rest()
            residence.drop_weights()
        if level == 2:
            residence.forget_rest()
        if residence.cache.is_here:
            residence.cache.leave()

    def _wake(self, tags: Collection[str]) -> None:
        residence = self._known()
        if "weights" in tags and not residence.has_weights:
            residence.put_weights(residence.fetch())
        if "kv_cache" in tags and not residence.cache.is_here:
            residence.cache.come()
