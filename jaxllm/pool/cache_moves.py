"""Moves caches of a pool's models to the host and back while other models run, and keeps the books of their bytes.

On the thread that steps the engines, but for the copying. A cache that leaves has its bytes until the copy is done; one
that comes has them from the start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

from jaxllm.pool.budget import Budget
from jaxllm.pool.cache_part import CachePart, Where
from jaxllm.pool.model import PooledModel
from jaxllm.pool.switches import SwitchTotals

log = logging.getLogger(__name__)
_PART = "cache"
Copied = tuple[int, float]  # bytes, seconds


@final
class CacheMoves:
    """Caches on their way.

    Args:
        models: all of the pool, by name.
        budget: of each device.
        totals: where bytes and seconds are counted.
    """

    def __init__(self, models: dict[str, PooledModel], budget: Budget, totals: SwitchTotals):
        self._models, self._budget, self._totals = models, budget, totals
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv")  # one for each direction, say

    @property
    def leaving_bytes(self) -> int:
        """That will be free without further ado."""
        return sum(m.residence.sizes.cache for m in self._models.values() if m.residence and _is(m, Where.LEAVING))

    def send_away(self, model: PooledModel) -> None:
        """Begin to bring a cache to the host."""
        cache = _cache(model)
        cache.begin_leaving()
        model.moving = self._threads.submit(_timed, cache.copy_out)

    def bring_back(self, model: PooledModel) -> None:
        """Begin to bring a cache to the devices, which have room for it."""
        assert model.residence is not None
        self._budget.take(model.name, _PART, model.residence.sizes.cache)
        cache = _cache(model)
        cache.begin_coming()
        model.moving = self._threads.submit(_timed, cache.copy_in)

    def keep(self, model: PooledModel) -> None:
        """Have a cache that is leaving stay: it is all there."""
        if _is(model, Where.LEAVING) and model.moving is not None:
            moving, model.moving = model.moving, None
            _cache(model).stay()
            self._wait(moving)
            _cache(model).stayed()

    def finish(self, model: PooledModel) -> None:
        """Wait until a cache is where it goes, if it goes anywhere. Raises what kept it from coming."""
        if model.moving is None:
            return
        moving, model.moving = model.moving, None
        leaves = _is(model, Where.LEAVING)
        try:
            num_bytes, seconds = self._wait(moving)
        except Exception as error:
            if not leaves:
                _cache(model).turned_back()
                self._budget.give_back(model.name, _PART)
                raise
            log.warning("the cache of %s is lost on its way to the host: %s", model.name, error)
            _cache(model).lose()
        else:
            self._totals.cache_bytes += num_bytes
            self._totals.cache_copy_seconds += seconds
            (_cache(model).gone if leaves else _cache(model).arrived)()
        if leaves:
            self._budget.give_back(model.name, _PART)

    def settle(self, model: PooledModel) -> None:
        """Wait until nothing of a cache moves, wherever it is then: whoever needs it tries again, and hears why not."""
        try:
            self.finish(model)
        except Exception as error:
            log.warning("the cache of %s could not be brought back: %s", model.name, error)

    def arrive(self) -> None:
        """Take note of copies that are done."""
        for model in self._models.values():
            if model.moving is not None and model.moving.done():
                self.settle(model)

    def wait_for(self, num_bytes: int) -> None:
        """Wait until caches that leave have made so much room; the caller knows that they will."""
        for model in list(self._models.values()):
            if self._budget.free >= num_bytes:
                return
            if _is(model, Where.LEAVING):
                self.finish(model)

    def shutdown(self) -> None:
        """End what is under way."""
        self._threads.shutdown(wait=True)

    def _wait(self, moving: Future[Copied]) -> Copied:
        started = time.perf_counter()
        try:
            return moving.result()
        finally:
            self._totals.cache_wait_seconds += time.perf_counter() - started


def _cache(model: PooledModel) -> CachePart:
    assert model.residence is not None
    return model.residence.cache


def _is(model: PooledModel, where: Where) -> bool:
    return model.residence is not None and model.residence.cache.where is where


def _timed(copy: Callable[[], int]) -> Copied:
    started = time.perf_counter()
    return copy(), time.perf_counter() - started
