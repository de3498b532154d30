"""Who is on the devices: brings models on, and fetches what the next one needs beforehand.

On the thread that steps the engines, between iterations of whichever is moved. Knows nothing of requests or policies:
it is told who runs and who comes next.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

from jaxllm.pool.budget import Budget, NoRoom
from jaxllm.pool.cache_moves import CacheMoves
from jaxllm.pool.cache_part import Where
from jaxllm.pool.model import PooledModel
from jaxllm.pool.residence import Residence, Sizes
from jaxllm.pool.room import Room
from jaxllm.pool.switches import Switch, SwitchTotals

log = logging.getLogger(__name__)
_KEPT_SWITCHES = 256


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
        self._caches = CacheMoves(models, budget, self.totals)
        self._room = Room(models, budget, self._caches, self.totals)
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def bring(self, model: PooledModel, upcoming: Sequence[str] = ()) -> None:
        """Put both parts of a model on the devices. Raises NoRoom where those that cannot leave take too much.

        What takes time goes on side by side: others' caches leave while its weights come, and its own cache comes.
        """
        residence = _residence(model)
        if self.current is model and residence.has_weights and residence.cache.is_here:
            return
        started, num_bytes, copying, waited = time.perf_counter(), 0, 0.0, 0.0
        self._caches.keep(model)
        self._room.clear(self._missing(model), {model.name}, upcoming, model.name)
        if not residence.has_weights and model.fetching is None:
            self._take_weights(model)
        if residence.cache.where is Where.AWAY and self.budget.free >= residence.sizes.cache:
            self._caches.bring_back(model)
        if not residence.has_weights:
            before, num_bytes = time.perf_counter(), residence.sizes.weights
            leaves, copying = self._weights(model)
            residence.put_weights(leaves)
            waited = time.perf_counter() - before
        if residence.cache.where is Where.AWAY:
            self._caches.wait_for(residence.sizes.cache)
            self._caches.bring_back(model)
        self._caches.finish(model)
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
        residence = _residence(model)
        weights = 0 if residence.has_weights or model.fetching is not None else residence.sizes.weights
        return weights + (residence.sizes.cache if residence.cache.where is Where.AWAY else 0)

    def _take_weights(self, model: PooledModel) -> None:
        size = _residence(model).sizes.weights
        self._caches.wait_for(size)
        self.budget.take(model.name, "weights", size)

    def _weights(self, model: PooledModel) -> tuple[Any, float]:
        """Weights on the devices, whose bytes were taken, and the seconds that copying them took."""
        residence = _residence(model)
        if model.fetching is not None:
            fetching, model.fetching = model.fetching, None
            try:
                return fetching.result()
            except Exception as error:  # the gaps were too short, say; whatever it is, it comes again if it lasts
                log.warning("the weights of %s could not be fetched beforehand: %s", model.name, error)
        try:
            return _timed(residence.fetch)
        except NoRoom:  # enough bytes are free, but not side by side
            for other in self._room.victims({model.name}, ()):
                self._room.drop_weights(other)
            return _timed(residence.fetch)
        except BaseException:
            self.budget.give_back(model.name, "weights")
            raise

    def prefetch(self, model: PooledModel, upcoming: Sequence[str]) -> None:
        """Go on to bring a model's parts while another runs, where that pushes out nobody whose turn is sooner.

        Weights first, then the cache; where a cache has to leave first it begins to, and the next call goes on.
        """
        residence = model.residence
        if residence is None or any(m.fetching is not None for m in self._models.values() if m is not model):
            return
        lacks_weights = not residence.has_weights and model.fetching is None
        if not lacks_weights and residence.cache.where is not Where.AWAY:
            return
        need = residence.sizes.weights if lacks_weights else residence.sizes.cache
        ahead = {model.name, *([self.current.name] if self.current else []), *_before(upcoming, model.name)}
        if self._room.reach(ahead, upcoming) < need:
            return
        self._room.clear(need, ahead, upcoming, model.name)
        if self.budget.free < need:
            return
        if lacks_weights:
            self._take_weights(model)
            self.totals.prefetches += 1
            model.fetching = self._fetcher.submit(_timed, residence.fetch)
        else:
            self._caches.bring_back(model)

    def arrive(self) -> None:
        """Take over what has come or gone meanwhile."""
        self._caches.arrive()
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
        self._room.clear(sizes.whole, {model.name}, (), model.name)
        self._caches.wait_for(sizes.whole)
        self.budget.take(model.name, "weights", sizes.weights)
        self.budget.take(model.name, "cache", sizes.cache)
        if sizes.staying:
            self.budget.take(*_staying(model), sizes.staying)

    def release(self, model: PooledModel) -> None:
        """Give back all bytes of a model that is gone, after freeing what is there."""
        self._settle(model)
        if model.residence is not None:
            model.residence.forget()
        self.budget.give_back(model.name, "weights")
        self.budget.give_back(model.name, "cache")
        self.budget.give_back(*_staying(model))
        if self.current is model:
            self.current = None

    def rested(self, model: PooledModel) -> None:
        """A model was loaded, and the host has its weights: they come to the devices with its first turn."""
        self._room.drop_weights(model)
        self._spare_host(model)

    def put_to_sleep(self, model: PooledModel) -> None:
        """Bring both parts off the devices."""
        self._settle(model)
        self._room.drop_weights(model)
        self._room.send_cache_away(model)
        self._caches.finish(model)
        if self.current is model:
            self.current = None

    def _settle(self, model: PooledModel) -> None:
        """Nothing of it is on its way afterwards."""
        self._room.end_fetch(model)
        self._caches.keep(model)
        self._caches.settle(model)

    def shutdown(self) -> None:
        """End what is under way."""
        self._fetcher.shutdown(wait=True)
        self._caches.shutdown()

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


def _residence(model: PooledModel) -> Residence:
    assert model.residence is not None
    return model.residence


def _staying(model: PooledModel) -> tuple[str, str]:
    """Owner and part of the bytes that never leave: they are not the model's, of which all can."""
    return f"adapters of {model.name}", "slots"


def _before(upcoming: Sequence[str], name: str) -> Sequence[str]:
    return upcoming[: upcoming.index(name)] if name in upcoming else upcoming
