"""Where the parts of one engine are: its weights and its cache (pages and slots), each on the devices or in the host.

An engine that lacks a part keeps everything else: programs, queues, page tables, requests with their tokens. When its
cache comes back every page has its old number, so that nobody notices. Only for the thread that steps the engine, while
nothing of it is on its way; `fetch` may run on another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine.engine import Engine
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.pool.host_kv import HostKV, page_bytes
from jaxllm.pool.slabs import Block
from jaxllm.pool.weights import Store, device_bytes
from jaxllm.runner.programs import abstract_state
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that an engine takes of each device: its weights; its pages, slots and pages on their way."""

    weights: int
    cache: int

    @classmethod
    def of(cls, model: AbstractModel, shapes: RunnerShapes) -> Sizes:
        """Known before anything is allocated."""
        state = abstract_state(model, shapes)
        pages, slots = device_bytes(jax.tree.leaves(state.pages)), device_bytes(jax.tree.leaves(state.slots))
        hidden = device_bytes([state.hidden])
        moving = 2 * MOVE_BATCH * pages // (shapes.num_pages * shapes.num_replicas)
        return cls(model.parameter_bytes_per_device(), pages + slots + hidden + moving)


@dataclass(slots=True)
class _Asleep:
    """A cache in the host: the content of pages by their number on the device, and the slots."""

    blocks: dict[int, Block]
    slots: Any


@final
class Residence:
    """The parts of one engine.

    Args:
        engine: has been started: both parts are on the devices.
        store: where weights go to and come from.
        host_kv: shared by all engines.
        reread: reads the parameters again, where the host has no copy.

    Attributes:
        rewound: requests that had to begin again because the host had no room for their pages.
    """

    def __init__(self, engine: Engine, store: Store, host_kv: HostKV, reread: Callable[[], Any]):
        self.sizes = Sizes.of(engine.runner.model, engine.runner.shapes)
        self.rewound = 0
        self._engine, self._store, self._host_kv, self._reread = engine, store, host_kv, reread
        self._page = engine.memory.slab()
        self._block_bytes = page_bytes(self._page)
        self._shape = object()
        self._at_rest: Any = None
        self._asleep: _Asleep | None = None

    # Weights.

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

    # Pages and slots.

    @property
    def has_cache(self) -> bool:
        """Whether it is on the devices."""
        return bool(self._engine.memory.pages)

    @property
    def num_blocks(self) -> int:
        """Pages in the host."""
        return len(self._asleep.blocks) if self._asleep is not None else 0

    def take_cache(self) -> None:
        """Bring every page that has content to the host, and free all on the devices.

        Where the host has no room, cached prefixes go first; then requests begin again when the cache is back.
        """
        engine = self._engine
        pages = self._kept()
        blocks = self._blocks(len(pages))
        if blocks is None:
            engine.evict_idle()
            engine.settle()
            pages = self._kept()
            blocks = self._blocks(len(pages))
        if blocks is None:
            self._rewind()
            pages, blocks = [], []
        for i in range(0, len(pages), MOVE_BATCH):
            taken = engine.runner.take_pages(pages[i : i + MOVE_BATCH])
            for block, page in zip(blocks[i : i + MOVE_BATCH], taken, strict=True):
                self._host_kv.write(block, page)
        state = engine.runner.state
        slots = jax.tree.map(np.array, state.slots)
        self._asleep = _Asleep(dict(zip(pages, blocks, strict=True)), slots)
        for leaf in jax.tree.leaves((state.pages, state.slots, state.hidden, state.scored)):
            leaf.delete()
        state.pages, state.slots, state.hidden, state.scored = [], None, None, None

    def put_cache(self) -> None:
        """Allocate it on the devices again, with what the host has of it."""
        engine, asleep = self._engine, self._asleep
        assert asleep is not None, "nothing was taken"
        engine.memory.allocate()
        whole = engine.runner.model.placement.replicated
        own = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), asleep.slots)  # programs write into it
        engine.runner.state.slots = jax.device_put(own, jax.tree.map(lambda _: whole, own))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._page)
        still = {*self._kept()}  # others ended meanwhile
        pages = [page for page in asleep.blocks if page in still]
        for i in range(0, len(pages), MOVE_BATCH):
            batch = pages[i : i + MOVE_BATCH]
            views = [self._host_kv.read(asleep.blocks[page], self._page) for page in batch]
            engine.runner.put_pages(batch, [jax.device_put(view, shardings) for view in views])
        engine.runner.block_until_ready()
        self._host_kv.slabs.free(list(asleep.blocks.values()))
        self._asleep = None

    def forget(self) -> None:
        """Free everything, in both memories: the engine is done with."""
        state = self._engine.runner.state
        if self.has_weights:
            self.drop_weights()
        for leaf in jax.tree.leaves((state.pages, state.slots, state.hidden, state.scored)):
            leaf.delete()
        state.pages, state.slots = [], None
        if self._asleep is not None:
            self._host_kv.slabs.free(list(self._asleep.blocks.values()))
        self._at_rest = self._asleep = None

    def _blocks(self, count: int) -> list[Block] | None:
        return self._host_kv.slabs.allocate(self._shape, self._block_bytes, count)

    def _kept(self) -> list[int]:
        """Pages of all replicas that somebody holds or may find."""
        size = self._engine.runner.shapes.num_pages
        return [i * size + page for i, pool in enumerate(self._engine.memory.pools) for page in pool.with_content()]

    def _rewind(self) -> None:
        engine = self._engine
        self.rewound += len(engine.unfinished)
        engine.recover()
