"""The books of the host's KV cache: slabs of one size, each cut into blocks of one shape. Plain Python.

A slab belongs to one shape (a model's page) while any of its blocks is in use; then it is free for any shape again. So
models whose pages differ share one memory, and it cannot fragment.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final


class Block(NamedTuple):
    """Bytes `[offset, offset + num_bytes)` of one slab."""

    slab: int
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Slab:
    shape: Hashable
    block_bytes: int
    free: list[int]  # offsets
    used: set[int] = field(default_factory=set)


@final
class Slabs:
    """Blocks of `num_slabs` slabs of `slab_bytes` each."""

    def __init__(self, num_slabs: int, slab_bytes: int):
        self.num_slabs, self.slab_bytes = num_slabs, slab_bytes
        self._slabs: dict[int, _Slab] = {}  # those in use
        self._free = list(range(num_slabs - 1, -1, -1))

    @property
    def num_used(self) -> int:
        """Slabs that belong to a shape."""
        return len(self._slabs)

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in use."""
        return sum(len(slab.used) * slab.block_bytes for slab in self._slabs.values())

    def allocate(self, shape: Hashable, block_bytes: int, count: int) -> list[Block] | None:
        """Blocks of one shape, those of slabs that have the shape already first; None (and nothing) if too few."""
        per_slab = self.slab_bytes // block_bytes
        mine = [(number, slab) for number, slab in self._slabs.items() if slab.shape == shape]
        missing = count - sum(len(slab.free) for _, slab in mine)
        if missing > len(self._free) * per_slab:
            return None
        for _ in range(-(-missing // per_slab) if missing > 0 else 0):
            number = self._free.pop()
            slab = _Slab(shape, block_bytes, [i * block_bytes for i in range(per_slab - 1, -1, -1)])
            self._slabs[number] = slab
            mine.append((number, slab))
        blocks = []
        for number, slab in mine:
            while slab.free and len(blocks) < count:
                offset = slab.free.pop()
                slab.used.add(offset)
                blocks.append(Block(number, offset, block_bytes))
        return blocks

    def free(self, blocks: Sequence[Block]) -> None:
        """Give blocks back; a slab without any is free for every shape."""
        for block in blocks:
            slab = self._slabs[block.slab]
            slab.used.remove(block.offset)
            slab.free.append(block.offset)
            if not slab.used:
                del self._slabs[block.slab]
                self._free.append(block.slab)

    def check(self) -> None:
        """Assert that the books balance."""
        assert sorted([*self._free, *self._slabs]) == list(range(self.num_slabs)), "a slab leaked"
        for slab in self._slabs.values():
            every = sorted([*slab.free, *slab.used])
            assert every == [i * slab.block_bytes for i in range(self.slab_bytes // slab.block_bytes)]
            assert slab.used, "an empty slab was not reclaimed"
