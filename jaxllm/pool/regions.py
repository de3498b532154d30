"""Which bytes of one long buffer are taken: first fit, neighbours that fall free are joined. Plain Python."""

from __future__ import annotations

from typing import final

_ALIGNMENT = 64


@final
class Regions:
    """The books of a buffer of `size` bytes."""

    def __init__(self, size: int):
        self.size = size
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, length), in order, never side by side
        self._taken: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes taken, rounded up to what alignment asks for."""
        return sum(self._taken.values())

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a free region, or None where no gap is long enough."""
        length = max(1, -(-num_bytes // _ALIGNMENT)) * _ALIGNMENT
        for i, (offset, gap) in enumerate(self._free):
            if gap >= length:
                self._free[i : i + 1] = [(offset + length, gap - length)] if gap > length else []
                self._taken[offset] = length
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give a region back."""
        gaps = sorted([*self._free, (offset, self._taken.pop(offset))])
        self._free = gaps[:1]
        for start, length in gaps[1:]:
            last, before = self._free[-1]
            if last + before == start:
                self._free[-1] = (last, before + length)
            else:
                self._free.append((start, length))
