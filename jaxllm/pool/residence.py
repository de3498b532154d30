"""Where the parts of one engine are: its weights and its cache (pages and slots), each on the devices or in the host.

An engine that lacks a part keeps everything else: programs, queues, page tables, requests with their tokens. Only for
the thread that steps the engine, while nothing of it is on its way; `fetch` may run on another, and `CachePart` says
what of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax

from jaxllm.engine.engine import Engine
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.pool.cache_part import CachePart
from jaxllm.pool.host_kv import HostKV
from jaxllm.pool.weights import Store, device_bytes
from jaxllm.runner.programs import abstract_state
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel

_BATCHES_MOVING = 3  # one is being stored, the next was taken, and its program needs as much again


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that an engine takes of each device.

    Attributes:
        weights: the model's, and those of the one that drafts for it.
        cache: pages, slots and pages on their way.
        staying: slots for adapters: they are small, and never leave.
    """

    weights: int
    cache: int
    staying: int = 0

    @property
    def whole(self) -> int:
        """All of these."""
        return self.weights + self.cache + self.staying

    @classmethod
    def of(cls, model: AbstractModel, shapes: RunnerShapes) -> Sizes:
        """Known before anything is allocated."""
        state = abstract_state(model, shapes)
        pages, slots = device_bytes(jax.tree.leaves(state.pages)), device_bytes(jax.tree.leaves(state.slots))
        drafts, adapters = (device_bytes(jax.tree.leaves(part)) for part in (state.draft_pages, state.adapters))
        hidden = device_bytes([state.hidden])
        moving = _BATCHES_MOVING * MOVE_BATCH * pages // (shapes.num_pages * shapes.num_replicas)
        return cls(model.parameter_bytes_per_device(), pages + drafts + slots + hidden + moving, adapters)


@final
class Residence:
    """The parts of one engine.

    Args:
        engine: has been started: both parts are on the devices.
        store: where weights go to and come from.
        host_kv: shared by all engines.
        reread: reads the parameters again, where the host has no copy.

    Attributes:
        cache: its other part.
    """

    def __init__(self, engine: Engine, store: Store, host_kv: HostKV, reread: Callable[[], Any]):
        self.sizes = Sizes.of(engine.runner.model, engine.runner.shapes)
        self.cache = CachePart(engine, host_kv)
        self._engine, self._store, self._reread = engine, store, reread
        self._at_rest: Any = None

    @property
    def has_weights(self) -> bool:
        """Whether they are on the devices."""
        return self._engine.runner.state.params is not None

    @property
    def is_at_rest(self) -> bool:
        """Whether the host has a copy of them."""
        return self._at_rest is not None

    def rest(self) -> None:
        """Make the host's copy of the weights on the devices."""
        self._at_rest = self._store.rest(self._engine.runner.state.params)

    def forget_rest(self) -> None:
        """Give up the host's copy; the weights are read from disk when they are needed."""
        self._at_rest = None

    def fetch(self) -> Sequence[jax.Array]:
        """A copy of the weights on the devices, for `put_weights`; from any thread.

        Where the copy in the host was given up they are read again. Raises NoRoom, or what reading does.
        """
        if self._at_rest is None:
            leaves = jax.tree.leaves(self._reread())
            self._at_rest = self._store.rest(leaves)
        return self._store.fetch(self._at_rest)

    def put_weights(self, leaves: Sequence[jax.Array]) -> None:
        """Let the engine run on these."""
        self._engine.runner.state.params = list(leaves)

    def drop_weights(self) -> None:
        """Free those on the devices."""
        leaves, self._engine.runner.state.params = self._engine.runner.state.params, None
        self._store.drop(leaves)

    def unused(self, leaves: Sequence[jax.Array]) -> None:
        """Free what was fetched in vain."""
        self._store.drop(leaves)

    def replace_weights(self, params: Any) -> None:
        """Other parameters of the same shapes; both parts are on the devices.

        Programs stay. What is cached was computed with the old ones and is forgotten: requests under way compute their
        tokens again.
        """
        old = self._engine.runner.state.params
        self._engine.runner.state.params = jax.tree.leaves(params)
        self._store.drop(old)
        self._engine.recover()
        self.rest()

    def forget(self) -> None:
        """Free everything, in both memories: the engine is done with. Nothing of it moves."""
        if self.has_weights:
            self.drop_weights()
        self.cache.forget()
        for leaf in jax.tree.leaves(self._engine.runner.state.adapters):
            leaf.delete()
        self._at_rest = None
