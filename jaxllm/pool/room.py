"""Makes room on the devices within the budget: who leaves for whom, the least missed first.

On the thread that steps the engines. Knows nothing of requests or policies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import final

from jaxllm.pool.budget import Budget, NoRoom
from jaxllm.pool.cache_moves import CacheMoves
from jaxllm.pool.cache_part import Where
from jaxllm.pool.model import PooledModel
from jaxllm.pool.switches import SwitchTotals

log = logging.getLogger(__name__)


@final
class Room:
    """The bytes of one instance's devices.

    Args:
        models: all of the pool, by name.
        budget: of each device.
        caches: moves them.
        totals: where prefetches in vain are counted.
    """

    def __init__(self, models: dict[str, PooledModel], budget: Budget, caches: CacheMoves, totals: SwitchTotals):
        self._models, self._budget, self._caches, self._totals = models, budget, caches, totals

    def clear(self, num_bytes: int, keep: Collection[str], upcoming: Sequence[str], name: str) -> None:
        """Have others leave until so many bytes are free, or will be when caches have left (see `CacheMoves.wait_for`).

        Args:
            keep: models that stay.
            upcoming: those whose turns follow, in their order.
            name: for whom.

        Raises:
            NoRoom: where those that cannot leave take too much.
        """
        for evict in self._evictions(keep, upcoming):
            if self._coming_free >= num_bytes:
                return
            evict()
        if self._coming_free < num_bytes:
            raise NoRoom(
                f"{name} takes {num_bytes} bytes of each device; {self._budget.limit} are there and "
                f"{self._budget.used} are taken by models that cannot leave; lower its max_model_len, max_num_seqs or "
                "kv_cache_memory_bytes, unpin another model, or raise device_memory_bytes"
            )

    def reach(self, keep: Collection[str], upcoming: Sequence[str]) -> int:
        """Bytes that could be had without breaking anything off that is under way."""
        return self._coming_free + sum(self._budget.held(model.name) for model in self.victims(keep, upcoming))

    @property
    def _coming_free(self) -> int:
        return self._budget.free + self._caches.leaving_bytes

    def _evictions(self, keep: Collection[str], upcoming: Sequence[str]) -> Iterator[Callable[[], None]]:
        """What could leave: of a model its weights, which need no copying, then its cache."""
        for model in self.victims(keep, upcoming):
            yield lambda model=model: self.drop_weights(model)
            yield lambda model=model: self.send_cache_away(model)
        for model in self._models.values():
            if model.name not in keep:
                yield lambda model=model: self.break_off(model)

    def victims(self, keep: Collection[str], upcoming: Sequence[str]) -> list[PooledModel]:
        """Models that may leave: first those without a turn to come, then by priority, then whose turn is last."""
        turns = {name: i for i, name in enumerate(upcoming)}
        never = len(turns)
        still = (m for m in self._models.values() if m.fetching is None and m.moving is None)
        here = [m for m in still if m.residence is not None and self._budget.held(m.name)]
        movable = [m for m in here if not m.entry.pinned and m.name not in keep]
        return sorted(movable, key=lambda m: (m.name in turns, -m.entry.priority, -turns.get(m.name, never), m.used))

    def drop_weights(self, model: PooledModel) -> None:
        """Free a model's weights; the host has them, or the disk."""
        if model.residence is not None and model.residence.has_weights:
            model.residence.drop_weights()
            self._budget.give_back(model.name, "weights")

    def send_cache_away(self, model: PooledModel) -> None:
        """Begin to bring a model's cache to the host."""
        if model.residence is not None and model.residence.cache.is_here:
            self._caches.send_away(model)

    def break_off(self, model: PooledModel) -> None:
        """Undo what was done for a model's next turn, where that has not been had yet."""
        self.end_fetch(model)
        if model.residence is not None and model.residence.cache.where is Where.COMING:
            self._caches.settle(model)
            self.send_cache_away(model)

    def end_fetch(self, model: PooledModel) -> None:
        """Wait for weights under way, and free them."""
        if model.fetching is None or model.residence is None:
            return
        fetching, model.fetching = model.fetching, None
        self._totals.wasted_prefetches += 1
        try:
            model.residence.unused(fetching.result()[0])
        except Exception as error:
            log.warning("the weights of %s could not be fetched: %s", model.name, error)
        self._budget.give_back(model.name, "weights")
