"""One engine's cache (pages and slots): on the devices, in the host, or on its way between the two.

Moving it has three parts, so that another engine can run meanwhile: what decides is for the thread that steps the
engines (`begin_leaving`, `gone`, `arrived`), what copies is for any other (`copy_out`, `copy_in`). While pages leave
they stay where they are, and their bytes stay taken: until `gone` the cache can be had back at once (`stay`). When it
comes back every page has its old number, so that nobody notices. The engine must not run, nor have anything on its
way, while its cache moves; its requests may end.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.engine.engine import Engine
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.pool.host_kv import HostKV, page_bytes
from jaxllm.pool.slabs import Block


class Where(Enum):
    """Of a cache."""

    HERE = auto()
    LEAVING = auto()
    AWAY = auto()
    COMING = auto()


@dataclass(slots=True)
class _Copy:
    """In the host: the content of pages by their number on the device, and the slots."""

    blocks: dict[int, Block] = field(default_factory=dict)
    slots: Any = None


@final
class CachePart:
    """Where an engine's cache is.

    Args:
        engine: has been started: its cache is on the devices.
        host_kv: shared by all engines.

    Attributes:
        where: it is.
        rewound: requests that had to begin again because the host had no room for their pages.
    """

    def __init__(self, engine: Engine, host_kv: HostKV):
        self.where = Where.HERE
        self.rewound = 0
        self._engine, self._host_kv = engine, host_kv
        self._page = engine.memory.slab()
        self._block_bytes = page_bytes(self._page)
        self._shape = object()
        self._copy = _Copy()
        self._stays = threading.Event()

    @property
    def is_here(self) -> bool:
        """Whether the engine can run."""
        return self.where is Where.HERE

    @property
    def num_blocks(self) -> int:
        """Pages in the host."""
        return len(self._copy.blocks)

    @property
    def host_bytes(self) -> int:
        """Of these."""
        return self.num_blocks * self._block_bytes

    # To the host.

    def begin_leaving(self) -> None:
        """Find room in the host for every page that has content.

        Where there is none, cached prefixes are dropped; then requests begin again when the cache is back.
        """
        assert self.where is Where.HERE
        self._stays.clear()
        engine, pages = self._engine, self._kept()
        blocks = self._blocks(len(pages))
        if blocks is None:
            engine.evict_idle()
            engine.settle()
            pages = self._kept()
            blocks = self._blocks(len(pages))
        if blocks is None:
            self._begin_again()
            pages, blocks = [], []
        self._copy = _Copy(dict(zip(pages, blocks, strict=True)))
        self.where = Where.LEAVING

    def _begin_again(self) -> None:
        self.rewound += len(self._engine.unfinished)
        self._engine.recover()

    def copy_out(self) -> int:
        """Copy pages and slots; how many bytes of pages. Ends early where the cache stays."""
        pages, runner = list(self._copy.blocks.items()), self._engine.runner
        batches = [pages[i : i + MOVE_BATCH] for i in range(0, len(pages), MOVE_BATCH)]
        ahead: list[tuple[list[tuple[int, Block]], list[Any]]] = []
        for batch in [*batches, None]:  # the device copies one batch out of its pages while the last one is stored
            if self._stays.is_set():
                return 0
            if batch is not None:
                taken = runner.take_pages([page for page, _ in batch])
                for leaf in jax.tree.leaves(taken):
                    leaf.copy_to_host_async()
                ahead.append((batch, taken))
            if len(ahead) > 1 or (batch is None and ahead):
                self._store(*ahead.pop(0))
        self._copy.slots = jax.tree.map(np.array, runner.state.slots)
        return self.host_bytes

    def _store(self, batch: list[tuple[int, Block]], taken: list[Any]) -> None:
        for (_, block), page in zip(batch, taken, strict=True):
            self._host_kv.write(block, page)

    def stay(self) -> None:
        """It is needed again; call `stayed` when `copy_out` has returned."""
        self._stays.set()

    def stayed(self) -> None:
        """Forget the copy: nothing has left."""
        self._drop_copy()
        self.where = Where.HERE

    def gone(self) -> None:
        """Free the devices: all of it was copied."""
        self._free_devices()
        self.where = Where.AWAY

    def lose(self) -> None:
        """Free the devices though the copy failed: requests begin again when the cache is back."""
        self._drop_copy()
        self._begin_again()
        self._copy.slots = jax.tree.map(np.array, self._engine.runner.state.slots)
        self.gone()

    # To the devices.

    def begin_coming(self) -> None:
        """Its bytes are there."""
        assert self.where is Where.AWAY
        self.where = Where.COMING

    def copy_in(self) -> int:
        """Allocate it and fill it with what the host has; how many bytes of pages."""
        engine, copy = self._engine, self._copy
        engine.memory.allocate()
        whole = engine.runner.model.placement.replicated
        own = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), copy.slots)  # programs write into it
        engine.runner.state.slots = jax.device_put(own, jax.tree.map(lambda _: whole, own))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._page)
        still = {*self._kept()}  # others ended meanwhile
        pages = [page for page in list(copy.blocks) if page in still]
        for i in range(0, len(pages), MOVE_BATCH):
            batch = pages[i : i + MOVE_BATCH]
            views = [self._host_kv.read(copy.blocks[page], self._page) for page in batch]
            engine.runner.put_pages(batch, [jax.device_put(view, shardings) for view in views])
        engine.runner.block_until_ready()
        return len(pages) * self._block_bytes

    def arrived(self) -> None:
        """The engine can run; the host's room is free."""
        self._drop_copy()
        self.where = Where.HERE

    def turned_back(self) -> None:
        """It could not come, or is not wanted any more: the host has it still."""
        self._free_devices()
        self.where = Where.AWAY

    # Without another thread.

    def leave(self) -> None:
        """Bring it to the host, and wait."""
        self.begin_leaving()
        self.copy_out()
        self.gone()

    def come(self) -> None:
        """Bring it to the devices, and wait."""
        self.begin_coming()
        self.copy_in()
        self.arrived()

    def forget(self) -> None:
        """Free everything in both memories; nothing of it moves."""
        self._free_devices()
        self._drop_copy()
        self.where = Where.AWAY

    def _free_devices(self) -> None:
        state = self._engine.runner.state
        for leaf in jax.tree.leaves((state.pages, state.draft_pages, state.slots, state.hidden, state.scored)):
            leaf.delete()
        state.pages, state.draft_pages, state.slots, state.hidden, state.scored = [], [], None, None, None

    def _drop_copy(self) -> None:
        self._host_kv.slabs.free(list(self._copy.blocks.values()))
        self._copy = _Copy()

    def _blocks(self, count: int) -> list[Block] | None:
        return self._host_kv.slabs.allocate(self._shape, self._block_bytes, count)

    def _kept(self) -> list[int]:
        """Pages of all replicas that somebody holds or may find."""
        size = self._engine.runner.shapes.num_pages
        return [i * size + page for i, pool in enumerate(self._engine.memory.pools) for page in pool.with_content()]
