"""Carries pages between device, host memory and disk, beside the engine: what `Tiers` decides, it does.

Lists of moves in; page arrays changed, slabs in the host pool, files in the disk store. The engine's thread only
dispatches and looks what is ready; reading, checking, transferring and writing happen in threads. Knows nothing of
tokens or users.

A slab is one page over all layers, cut over devices as the pages are; in host memory it is a JAX array of the memory
kind `pinned_host`, or NumPy where the backend has none.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kv.disk_store import DiskStore, PageFormat
from jaxllm.kv.host_memory import HostMemory
from jaxllm.kv.layout import PageLayout
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.scheduling.tiers import Load, Span, Tiers

_BATCHES_AHEAD = 8  # on the device and not yet in their pages
_LEAVING_BYTES = 256 << 20  # on the device, out of their pages and not yet in the host: then the engine waits
_UNBOUNDED = 1e6  # seconds
_RESTING_SECONDS = 0.0005
_WRITES_AHEAD = 64  # slabs that wait for the disk; more are dropped


class HostPages(Protocol):
    """Who owns the pages, seen from the host: see `LocalPages`."""

    memory: HostMemory

    def bring_down(self, pages: Sequence[int]) -> list[Any]: ...

    def bring_up(self, slab: Any) -> Any: ...

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None: ...


@dataclass(slots=True)
class _LoadUnderWay:
    """One load: batches that were sent off, and what has arrived."""

    load: Load
    sent: deque[tuple[int, Future[tuple[list[Any], float]]]] = field(default_factory=deque)
    next: int = 0
    arrived: list[bool] = field(default_factory=list)


class Mover:
    """Moves for one engine.

    Args:
        arrays: owner of the page arrays.
        tiers: whose decisions are carried out.
        slab: shapes and shardings of one slab.
        disk: the tier after the host, or None.
        layout: how keys and values lie in a slab; the disk has them in the logical layout.
    """

    def __init__(self, arrays: HostPages, tiers: Tiers, slab: Any, disk: DiskStore | None, layout: PageLayout):
        self.disk = disk
        self.num_dropped_writes = 0
        self._arrays, self._tiers = arrays, tiers
        self._layout = layout
        self._structure = jax.tree.structure(slab)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="kv-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-write")
        self._writes: deque[Future[None]] = deque()
        self._loads: list[_LoadUnderWay] = []
        self._leaving: deque[tuple[float, Any]] = deque()
        self._last_left = 0.0
        self._save_until: float | None = None
        tiers.copy_rate = arrays.memory.copy_rate(tiers.page_bytes)

    # On the engine's thread.

    @property
    def is_moving(self) -> bool:
        """Whether any load is under way."""
        return bool(self._loads)

    def rest(self) -> None:
        """Whoever steps the engine has nothing to do: leave the processor to what copies, if anything does."""
        if self.is_moving:
            time.sleep(_RESTING_SECONDS)

    def start(self) -> None:
        """Send off what was decided since the last call, before anything else changes the pages.

        Evicted pages may have new owners already, so they are copied before any program is dispatched that writes
        there. The device runs programs in that order: nobody waits for the copy itself.
        """
        evictions = self._tiers.take_evictions()
        for i in range(0, len(evictions), MOVE_BATCH):
            self._bring_down(evictions[i : i + MOVE_BATCH])
        self._loads += [_LoadUnderWay(load) for load in self._tiers.take_loads()]
        self._loads.sort(key=lambda move: any(source is None for source in move.load.sources))  # the disk is slower
        for move in self._loads:
            self._send(move)

    def finish(self, loaded: Callable[[Load, Sequence[bool]], None]) -> int:
        """Put what has arrived into its pages; `loaded` hears of loads that are complete. Returns how many are."""
        self._count_left()
        done = [move for move in self._loads if self._advance(move)]
        for move in done:
            self._loads.remove(move)
            if not move.load.ended:
                loaded(move.load, move.arrived)
        return len(done)

    def reset(self) -> None:
        """Forget loads under way."""
        self._loads.clear()
        self._leaving.clear()

    def evict(self, key: bytes, slab: Any) -> None:
        """A slab leaves the host: write it to the disk, unless that is far behind. The host pool calls this."""
        if self.disk is None or key in self.disk:
            return
        if self._save_until is not None:
            self._write_in_time(key, slab)
            return
        while self._writes and self._writes[0].done():
            self._writes.popleft()
        if len(self._writes) >= _WRITES_AHEAD:
            self.num_dropped_writes += 1
            return
        self._writes.append(self._writer.submit(self._write, key, slab))

    def wait(self) -> None:
        """Wait for the copies into host memory that are under way."""
        for _, slab in self._leaving:
            jax.block_until_ready(slab)

    def save(self, seconds: float, evict: Callable[[], None]) -> None:
        """Write every prefix page to the disk, for at most `seconds` and the page that is being written then.

        On the calling thread, for when the interpreter ends no other takes work. May be interrupted and called again;
        what is on the disk is not written twice.

        Args:
            seconds: what is not on the disk then is dropped and counted.
            evict: pushes pages off the device.
        """
        if self.disk is None:
            return
        self._save_until = time.monotonic() + seconds
        try:
            wait(self._writes, seconds)
            evict()
            for key, slab in reversed(self._tiers.host.unpinned()):  # the most recently used are worth most
                if key not in self.disk:
                    self._write_in_time(key, slab)
        finally:
            self._save_until = None

    def flush(self) -> None:
        """Write every prefix page of the host to the disk, however long it takes."""
        self.save(_UNBOUNDED, lambda: None)

    def _write_in_time(self, key: bytes, slab: Any) -> None:
        assert self._save_until is not None
        if time.monotonic() < self._save_until:
            self._write(key, slab)
        else:
            self.num_dropped_writes += 1

    def _bring_down(self, evictions: Sequence[tuple[int, bytes]]) -> None:
        while len(self._leaving) * MOVE_BATCH * self._tiers.page_bytes > _LEAVING_BYTES:
            jax.block_until_ready(self._leaving[0][1])
            self._count_left()
        started = time.perf_counter()
        slabs = self._arrays.bring_down([page for page, _ in evictions])
        for (_, key), slab in zip(evictions, slabs, strict=True):
            self._tiers.host.fill(key, slab)
        self._tiers.stats.pages_out += len(evictions)
        self._leaving.append((started, slabs[-1]))

    def _count_left(self) -> None:
        """Count the time of copies to the host that are complete."""
        while self._leaving and _is_ready(self._leaving[0][1]):
            started, _ = self._leaving.popleft()
            now = time.perf_counter()
            self._tiers.stats.seconds_out += now - max(started, self._last_left)
            self._last_left = now

    def _send(self, move: _LoadUnderWay) -> None:
        load = move.load
        while move.next < len(load.keys) and sum(len(other.sent) for other in self._loads) < _BATCHES_AHEAD:
            batch = slice(move.next, move.next + MOVE_BATCH)
            move.sent.append(
                (move.next, self._readers.submit(self._bring, load, load.keys[batch], load.sources[batch]))
            )
            move.next += MOVE_BATCH

    def _advance(self, move: _LoadUnderWay) -> bool:
        """Put the batches that are here into their pages; whether that was all."""
        while move.sent and move.sent[0][1].done():
            first, future = move.sent.popleft()
            slabs, seconds = future.result()
            self._learn_rate(sum(slab is not None for slab in slabs), seconds)
            pages = move.load.pages[first : first + len(slabs)]
            here = [(page, slab) for page, slab in zip(pages, slabs, strict=True) if slab is not None]
            if here and not move.load.ended:
                self._arrays.put_pages([page for page, _ in here], [slab for _, slab in here])
            move.arrived += [slab is not None for slab in slabs]
        self._send(move)
        return move.load.ended or len(move.arrived) == len(move.load.keys)

    def _learn_rate(self, num_pages: int, seconds: float) -> None:
        self._tiers.stats.seconds_in += seconds
        if num_pages and seconds:
            rate = num_pages * self._tiers.page_bytes / seconds
            self._tiers.copy_rate += 0.2 * (rate - self._tiers.copy_rate)

    # In threads.

    def _bring(self, load: Load, keys: Sequence[bytes], sources: Sequence[Any]) -> tuple[list[Any], float]:
        """Slabs on the device, None where the page cannot be had, and the seconds from host to device."""
        if load.ended:
            return [None] * len(keys), 0.0
        known = self._fetched(sources)
        slabs = [self._read(key) if slab is None else slab for key, slab in zip(keys, known, strict=True)]
        started = time.perf_counter()
        slabs = [None if slab is None else self._arrays.bring_up(slab) for slab in slabs]
        jax.block_until_ready(slabs)
        return slabs, time.perf_counter() - started

    def _fetched(self, sources: Sequence[Any]) -> list[Any]:
        """The sources, with slabs where there were spans: those of one load are of one offer."""
        spans = [source for source in sources if isinstance(source, Span)]
        if not spans:
            return list(sources)
        fetched = iter(spans[0].offer.fetch([(span.start, span.stop) for span in spans]))
        return [next(fetched) if isinstance(source, Span) else source for source in sources]

    def _read(self, key: bytes) -> Any | None:
        arrays = self.disk.read(key) if self.disk is not None else None
        if arrays is None:
            return None
        return jax.tree.unflatten(self._structure, [self._layout.from_logical(array) for array in arrays])

    def _write(self, key: bytes, slab: Any) -> None:
        assert self.disk is not None
        self.disk.write(key, [self._layout.to_logical(np.asarray(leaf)) for leaf in jax.tree.leaves(slab)])


def page_format(slab: Any, model: str, layout: PageLayout) -> PageFormat:
    """What a slab looks like on disk."""

    def array(leaf: Any) -> tuple[tuple[int, ...], str]:
        zero = np.zeros(1, jnp.dtype(leaf.dtype))
        one = layout.to_logical(np.lib.stride_tricks.as_strided(zero, leaf.shape, (0,) * len(leaf.shape)))  # no memory
        return one.shape, one.dtype.name

    return PageFormat(model, tuple(array(leaf) for leaf in jax.tree.leaves(slab)))


def _is_ready(slab: Any) -> bool:
    return all(leaf.is_ready() for leaf in jax.tree.leaves(slab) if not isinstance(leaf, np.ndarray))
