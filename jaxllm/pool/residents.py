"""Who is on the devices: makes room within the budget, brings models on, and fetches the next one's weights beforehand.

On the thread that steps the engines, between iterations of whichever is moved. Knows nothing of requests or policies:
it is told who runs and who comes next.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

from jaxllm.pool.budget import Budget, NoRoom
from jaxllm.pool.model import PooledModel
from jaxllm.pool.residence import Sizes

log = logging.getLogger(__name__)
_KEPT_SWITCHES = 256


@dataclass(frozen=True, slots=True)
class Switch:
    """One model came onto the devices.

    Attributes:
        time: seconds since the epoch.
        model, left: who came; who was on before it.
        seconds: that everybody waited for it.
        num_bytes: of weights.
        copy_seconds: that copying them took; what is not in `seconds` was hidden behind other models' work.
    """

    time: float
    model: str
    left: str | None
    seconds: float
    num_bytes: int
    copy_seconds: float


@dataclass(slots=True)
class SwitchTotals:
    """Sums since the start."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    copy_seconds: float = 0.0
    weight_wait_seconds: float = 0.0
    cache_seconds: float = 0.0
    prefetches: int = 0
    wasted_prefetches: int = 0


@final
class Residents:
    """The models on the devices of one instance.

    Args:
        models: all of the pool, by name.
        budget: of each device.
        rest_limit: bytes of weights that the host keeps; None: all.
    """

    def __init__(self, models: dict[str, PooledModel], budget: Budget, rest_limit: int | None):
        self.budget = budget
        self.totals = SwitchTotals()
        self.switches: deque[Switch] = deque(maxlen=_KEPT_SWITCHES)
        self.current: PooledModel | None = None
        self._models, self._rest_limit = models, rest_limit
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def bring(self, model: PooledModel, upcoming: Sequence[str] = ()) -> None:
        """Put both parts of a model on the devices. Raises NoRoom where those that cannot leave take too much."""
        residence = model.residence
        assert residence is not None
        if self.current is model and residence.has_weights and residence.has_cache:
            return
        started, num_bytes, copying, waited = time.perf_counter(), 0, 0.0, 0.0
        self._make_room(self._missing(model), {model.name}, upcoming, model.name)
        if not residence.has_weights:
            num_bytes = residence.sizes.weights
            leaves, copying = self._weights(model)
            residence.put_weights(leaves)
            waited = time.perf_counter() - started
        before = time.perf_counter()
        if not residence.has_cache:
            self._take(model, "cache", residence.sizes.cache)
            residence.put_cache()
        self.totals.cache_seconds += time.perf_counter() - before
        self._came(model, time.perf_counter() - started, num_bytes, copying, waited)

    def _came(self, model: PooledModel, seconds: float, num_bytes: int, copying: float, waited: float) -> None:
        if self.current is not model:
            left = self.current.name if self.current is not None else None
            self.switches.append(Switch(time.time(), model.name, left, seconds, num_bytes, copying))
            model.num_switches += 1
            self.totals.count += 1
        self.current = model
        self.totals.seconds += seconds
        self.totals.num_bytes += num_bytes
        self.totals.copy_seconds += copying
        self.totals.weight_wait_seconds += waited
        model.measured.learn("switch", seconds)
        self._spare_host(model)

    def _missing(self, model: PooledModel) -> int:
        residence = model.residence
        assert residence is not None
        weights = 0 if residence.has_weights or model.fetching is not None else residence.sizes.weights
        return weights + (0 if residence.has_cache else residence.sizes.cache)

    def _weights(self, model: PooledModel) -> tuple[Any, float]:
        """Weights on the devices, and the seconds that copying them took."""
        residence = model.residence
        assert residence is not None
        if model.fetching is not None:
            fetching, model.fetching = model.fetching, None
            try:
                return fetching.result()
            except Exception as error:  # the gaps were too short, say; whatever it is, it comes again if it lasts
                log.warning("the weights of %s could not be fetched beforehand: %s", model.name, error)
                self.budget.give_back(model.name, "weights")
        self._take(model, "weights", residence.sizes.weights)
        try:
            return _timed(residence.fetch)
        except NoRoom:  # enough bytes are free, but not side by side
            for other in self._victims({model.name}, ()):
                self._drop_weights(other)
            return _timed(residence.fetch)
        except BaseException:
            self.budget.give_back(model.name, "weights")
            raise

    def prefetch(self, model: PooledModel, upcoming: Sequence[str]) -> None:
        """Begin to copy a model's weights while another runs, where that pushes out nobody whose turn is sooner."""
        residence = model.residence
        if residence is None or residence.has_weights or model.fetching is not None:
            return
        if any(other.fetching is not None for other in self._models.values()):
            return
        ahead = {model.name, *([self.current.name] if self.current else []), *_before(upcoming, model.name)}
        need = residence.sizes.weights
        if self.budget.free + sum(self._leaving(other) for other in self._victims(ahead, upcoming)) < need:
            return
        self._make_room(need, ahead, upcoming, model.name)
        self._take(model, "weights", need)
        self.totals.prefetches += 1
        model.fetching = self._fetcher.submit(_timed, residence.fetch)

    def arrive(self) -> None:
        """Take over weights that have been fetched meanwhile."""
        for model in self._models.values():
            if model.fetching is not None and model.fetching.done() and model.residence is not None:
                fetching, model.fetching = model.fetching, None
                try:
                    leaves, seconds = fetching.result()
                except Exception as error:  # whoever needs them tries again and hears it
                    log.warning("the weights of %s could not be fetched beforehand: %s", model.name, error)
                    self.budget.give_back(model.name, "weights")
                else:
                    model.residence.put_weights(leaves)
                    self.totals.copy_seconds += seconds
                    self.totals.num_bytes += model.residence.sizes.weights

    def reserve(self, model: PooledModel, sizes: Sizes) -> None:
        """Take the bytes of a model that is about to be loaded. Raises NoRoom with what it takes."""
        self._make_room(sizes.weights + sizes.cache, {model.name}, (), model.name)
        self.budget.take(model.name, "weights", sizes.weights)
        self.budget.take(model.name, "cache", sizes.cache)

    def release(self, model: PooledModel) -> None:
        """Give back all bytes of a model that is gone, after freeing what is there."""
        self._end_fetch(model)
        if model.residence is not None:
            model.residence.forget()
        self.budget.give_back(model.name, "weights")
        self.budget.give_back(model.name, "cache")
        if self.current is model:
            self.current = None

    def rested(self, model: PooledModel) -> None:
        """A model was loaded, and the host has its weights: they come to the devices with its first turn."""
        self._drop_weights(model)
        self._spare_host(model)

    def put_to_sleep(self, model: PooledModel) -> None:
        """Bring both parts off the devices."""
        self._end_fetch(model)
        self._drop_weights(model)
        self._drop_cache(model)
        if self.current is model:
            self.current = None

    def shutdown(self) -> None:
        """End what is under way."""
        self._fetcher.shutdown(wait=True)

    # Room.

    def _take(self, model: PooledModel, part: str, num_bytes: int) -> None:
        self.budget.take(model.name, part, num_bytes)

    def _make_room(self, num_bytes: int, keep: Collection[str], upcoming: Sequence[str], name: str) -> None:
        for evict in self._evictions(keep, upcoming):
            if self.budget.free >= num_bytes:
                return
            evict()
        if self.budget.free < num_bytes:
            raise NoRoom(
                f"{name} takes {num_bytes} bytes of each device; {self.budget.limit} are there and {self.budget.used} "
                "are taken by models that cannot leave; lower its max_model_len, max_num_seqs or "
                "kv_cache_memory_bytes, unpin another model, or raise device_memory_bytes"
            )

    def _evictions(self, keep: Collection[str], upcoming: Sequence[str]) -> Iterator[Callable[[], None]]:
        """What could leave, the least missed first: of a model its weights, which need no copying, then its cache."""
        for model in self._victims(keep, upcoming):
            yield lambda model=model: self._drop_weights(model)
            yield lambda model=model: self._drop_cache(model)
        for model in self._models.values():
            if model.fetching is not None and model.name not in keep:
                yield lambda model=model: self._end_fetch(model)

    def _victims(self, keep: Collection[str], upcoming: Sequence[str]) -> list[PooledModel]:
        """Models that may leave: first those without a turn to come, then by priority, then whose turn is last."""
        turns = {name: i for i, name in enumerate(upcoming)}
        never = len(turns)
        here = [m for m in self._models.values() if m.residence is not None and self.budget.held(m.name)]
        movable = [m for m in here if not m.entry.pinned and m.name not in keep and m.fetching is None]
        return sorted(movable, key=lambda m: (m.name in turns, -m.entry.priority, -turns.get(m.name, never), m.used))

    def _leaving(self, model: PooledModel) -> int:
        return self.budget.held(model.name)

    def _drop_weights(self, model: PooledModel) -> None:
        if model.residence is not None and model.residence.has_weights:
            model.residence.drop_weights()
            self.budget.give_back(model.name, "weights")

    def _drop_cache(self, model: PooledModel) -> None:
        if model.residence is not None and model.residence.has_cache:
            model.residence.take_cache()
            self.budget.give_back(model.name, "cache")

    def _end_fetch(self, model: PooledModel) -> None:
        if model.fetching is None or model.residence is None:
            return
        fetching, model.fetching = model.fetching, None
        self.totals.wasted_prefetches += 1
        try:
            model.residence.unused(fetching.result()[0])
        except Exception as error:
            log.warning("the weights of %s could not be fetched: %s", model.name, error)
        self.budget.give_back(model.name, "weights")

    def _spare_host(self, newest: PooledModel) -> None:
        """Give up host copies beyond the limit, of who was used longest ago; these are read from disk again."""
        if self._rest_limit is None:
            return
        resting = [m for m in self._models.values() if m.residence is not None and m.residence.is_at_rest]
        total = sum(m.residence.sizes.weights for m in resting if m.residence is not None)
        for model in sorted(resting, key=lambda m: (m.has_work, m.used)):
            if total <= self._rest_limit:
                return
            if model is not newest and model.residence is not None and model.fetching is None:
                model.residence.forget_rest()
                total -= model.residence.sizes.weights


def _timed(fetch: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return fetch(), time.perf_counter() - started


def _before(upcoming: Sequence[str], name: str) -> Sequence[str]:
    return upcoming[: upcoming.index(name)] if name in upcoming else upcoming
