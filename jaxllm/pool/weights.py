"""A model's parameters at rest in host memory, in device layout, and the way to the devices.

Whatever a parameter is kept as (shards, panels, quantised matrices), it is leaves that are arrays; the shards of each
are copied as they are. On an accelerator they rest in pinned memory, and the device fetches them. On a CPU both
memories are the same kind; there the devices' part is one buffer per device, allocated once: fresh memory costs many
times what copying into old memory does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.pool.budget import NoRoom
from jaxllm.pool.regions import Regions
from jaxllm.weights.memory import aligned_zeros

_SLACK = 1 << 20  # beyond the limit, for the alignment of leaves


def device_bytes(leaves: Sequence[Any]) -> int:
    """Bytes that arrays, or their shapes with shardings, take on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


Device = Any  # JAX names the class in a way that type checkers do not follow


class Store(Protocol):
    """One kind of devices, as weights see them."""

    def rest(self, leaves: Sequence[jax.Array]) -> Any:
        """A copy in host memory of parameters on the devices, or these themselves where the two are one memory."""
        ...

    def fetch(self, at_rest: Any) -> Sequence[jax.Array]:
        """A copy on the devices; complete when this returns. On any thread. Raises NoRoom."""
        ...

    def drop(self, leaves: Sequence[jax.Array]) -> None:
        """Free a copy that `fetch` made, or parameters as they were loaded; no program uses them any more."""
        ...


def make_store(device: Device, limit: int) -> Store:
    """The store of devices like this one, with so many bytes each."""
    return _CpuStore(limit) if device.platform == "cpu" else _AcceleratorStore()


def make_plain_store(device: Device) -> Store:
    """The store of an engine that is alone: on a CPU, where both memories are one, nothing is copied."""
    return _OneMemory() if device.platform == "cpu" else _AcceleratorStore()


@final
class _OneMemory:
    def rest(self, leaves: Sequence[jax.Array]) -> Any:
        return list(leaves)

    def fetch(self, at_rest: Any) -> Sequence[jax.Array]:
        return at_rest

    def drop(self, leaves: Sequence[jax.Array]) -> None:
        pass


@final
class _AcceleratorStore:
    def rest(self, leaves: Sequence[jax.Array]) -> Any:
        down = [leaf.sharding.with_memory_kind("pinned_host") for leaf in leaves]
        return [leaf.sharding for leaf in leaves], jax.block_until_ready(jax.device_put(list(leaves), down))

    def fetch(self, at_rest: Any) -> Sequence[jax.Array]:
        shardings, leaves = at_rest
        return jax.block_until_ready(jax.device_put(leaves, shardings))

    def drop(self, leaves: Sequence[jax.Array]) -> None:
        for leaf in leaves:
            leaf.delete()


@final
class _CpuStore:
    """One buffer for each device; arrays on it are views."""

    def __init__(self, limit: int):
        self._limit = limit
        self._buffers: dict[Device, tuple[np.ndarray, Regions]] = {}
        self._regions: dict[int, list[tuple[Device, int]]] = {}  # by the id of a leaf
        self._lock = threading.Lock()

    def rest(self, leaves: Sequence[jax.Array]) -> Any:
        parts = [[(s.device, np.ascontiguousarray(s.data)) for s in leaf.addressable_shards] for leaf in leaves]
        return [(leaf.shape, leaf.sharding) for leaf in leaves], parts

    def fetch(self, at_rest: Any) -> Sequence[jax.Array]:
        made: list[jax.Array] = []
        try:
            for (shape, sharding), parts in zip(*at_rest, strict=True):
                made.append(self._copy(shape, sharding, parts))
        except NoRoom:
            self.drop(made)
            raise
        return made

    def _copy(self, shape: Sequence[int], sharding: Any, parts: Sequence[tuple[Device, np.ndarray]]) -> jax.Array:
        taken: list[tuple[Device, int]] = []
        arrays = []
        for device, part in parts:
            buffer, offset = self._allocate(device, part.nbytes, taken)
            view = buffer[offset : offset + part.nbytes].view(part.dtype).reshape(part.shape)
            np.copyto(view, part)
            arrays.append(jax.device_put(view, device, may_alias=True))
        leaf = jax.make_array_from_single_device_arrays(tuple(shape), sharding, arrays)
        self._regions[id(leaf)] = taken
        return leaf

    def _allocate(self, device: Device, num_bytes: int, taken: list[tuple[Device, int]]) -> tuple[np.ndarray, int]:
        with self._lock:
            if device not in self._buffers:
                size = self._limit + _SLACK
                self._buffers[device] = aligned_zeros((size,), jnp.dtype("uint8")), Regions(size)
            buffer, regions = self._buffers[device]
            offset = regions.allocate(num_bytes)
            if offset is None:
                for where, other in taken:
                    self._buffers[where][1].free(other)
                raise NoRoom(f"no gap of {num_bytes} bytes among the weights on the device")
            taken.append((device, offset))
            return buffer, offset

    def drop(self, leaves: Sequence[jax.Array]) -> None:
        for leaf in leaves:
            if (taken := self._regions.pop(id(leaf), None)) is None:
                continue  # as it was loaded: the host's copy is this memory
            leaf.delete()
            with self._lock:
                for device, offset in taken:
                    self._buffers[device][1].free(offset)
