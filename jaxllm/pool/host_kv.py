"""KV pages of models that are not on the device, in slabs of host memory.

Arrays of one page in, a `Block` out, and back. The memory of a slab is allocated when it is first used and kept: it is
touched once, whichever models use it. Not for two threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np

from jaxllm.pool.slabs import Block, Slabs


@final
class HostKV:
    """`num_bytes` of host memory in slabs of `slab_bytes`."""

    def __init__(self, num_bytes: int, slab_bytes: int):
        self.slabs = Slabs(num_bytes // slab_bytes, slab_bytes)
        self._memory: dict[int, np.ndarray] = {}

    def write(self, block: Block, page: Any) -> None:
        """Copy a page (a tree of arrays on the device) into its block; waits until it is there."""
        at = block.offset
        for leaf in jax.tree.leaves(page):
            content = np.asarray(leaf)
            target = self._bytes(block.slab)[at : at + content.nbytes]
            np.copyto(target, np.ascontiguousarray(content).reshape(-1).view(np.uint8))
            at += content.nbytes

    def read(self, block: Block, like: Any) -> Any:
        """The page in a block, as a tree of arrays that are views: use them before the block is given back."""
        leaves, at = [], block.offset
        for leaf in jax.tree.leaves(like):
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            leaves.append(self._bytes(block.slab)[at : at + size].view(leaf.dtype).reshape(leaf.shape))
            at += size
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _bytes(self, slab: int) -> np.ndarray:
        if slab not in self._memory:
            self._memory[slab] = np.empty(self.slabs.slab_bytes, np.uint8)
        return self._memory[slab]


def page_bytes(like: Any) -> int:
    """Of one page in the host, from its shapes."""
    leaves: Sequence[Any] = jax.tree.leaves(like)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
