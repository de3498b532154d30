"""Slabs (one page over all layers) between the devices and this process's memory.

On the device a slab is cut as the pages are; in host memory it is arrays of the memory kind `pinned_host` (which a
device reads and writes by itself, beside its programs; the system never swaps it out), or NumPy where the backend has
none. Where the mesh spans several processes, each keeps the parts that lie on its own devices.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxllm.kv.page_programs import MOVE_BATCH


class DevicePages(Protocol):
    """Who owns the pages on the devices."""

    def take_pages(self, pages: Sequence[int]) -> list[Any]:
        """A copy of each page, as slabs on the device."""
        ...

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None:
        """Write slabs into pages."""
        ...


class HostMemory:
    """Down and up again, for slabs of one kind: `slab` has the shapes and shardings."""

    def __init__(self, slab: Any):
        self._slab = slab
        self._on_device = jax.tree.map(lambda leaf: leaf.sharding, slab)
        first = jax.tree.leaves(self._on_device)[0]
        self._is_shared = not first.is_fully_addressable
        device = next(iter(first.addressable_devices))
        self._pins = "pinned_host" in [memory.kind for memory in device.addressable_memories()]
        self._in_host = jax.tree.map(lambda sharding: sharding.with_memory_kind("pinned_host"), self._on_device)

    def down(self, slab: Any) -> Any:
        """A copy in host memory; with pinned memory it is on its way."""
        if self._is_shared:
            return jax.tree.map(lambda leaf: [self._part_down(shard.data) for shard in leaf.addressable_shards], slab)
        return jax.device_put(slab, self._in_host) if self._pins else jax.tree.map(np.asarray, slab)

    def up(self, slab: Any) -> Any:
        """A copy on the devices, on its way."""
        if not self._is_shared:
            return jax.device_put(slab, self._on_device)
        leaves, structure = jax.tree.flatten(self._slab)
        parts = structure.flatten_up_to(slab)
        return jax.tree.unflatten(structure, [_joined(leaf, part) for leaf, part in zip(leaves, parts, strict=True)])

    def _part_down(self, part: jax.Array) -> Any:
        if not self._pins:
            return np.asarray(part)
        (device,) = part.devices()
        return jax.device_put(part, SingleDeviceSharding(device, memory_kind="pinned_host"))

    def copy_rate(self, slab_bytes: int) -> float:
        """Bytes per second down and up again, with a batch of empty slabs, the second time."""
        zeros = [self._zeros()] * MOVE_BATCH
        jax.block_until_ready([self.up(self.down(slab)) for slab in zeros])
        started = time.perf_counter()
        host = jax.block_until_ready([self.down(slab) for slab in zeros])
        jax.block_until_ready([self.up(slab) for slab in host])
        return 2 * MOVE_BATCH * slab_bytes / (time.perf_counter() - started)

    def _zeros(self) -> Any:
        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            part = np.zeros(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda _: part)

        return jax.block_until_ready(jax.tree.map(zeros, self._slab))


def _joined(leaf: jax.ShapeDtypeStruct, parts: Sequence[Any]) -> jax.Array:
    """The array of which these are the parts on this process's devices, in their order."""
    devices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    here = [
        jax.device_put(part, SingleDeviceSharding(device, memory_kind=device.default_memory().kind))
        for part, device in zip(parts, devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, here)


class LocalPages:
    """The pages of one process: host slabs in place of device slabs."""

    def __init__(self, pages: DevicePages, memory: HostMemory):
        self._pages, self.memory = pages, memory

    def bring_down(self, pages: Sequence[int]) -> list[Any]:
        """A copy of each page, on its way into host memory."""
        return [self.memory.down(slab) for slab in self._pages.take_pages(pages)]

    def bring_up(self, slab: Any) -> Any:
        """A host slab on its way to the devices; from any thread."""
        return self.memory.up(slab)

    def put_pages(self, pages: Sequence[int], slabs: Sequence[Any]) -> None:
        """Write what was brought up into pages."""
        self._pages.put_pages(pages, slabs)
