"""Bytes of one kind of memory: who has how many, never more than there are. Plain Python.

Each owner's parts (a model's weights, its cache) are taken and given back whole, so that what is free is always usable.
"""

from __future__ import annotations

from typing import final


class NoRoom(RuntimeError):
    """A model does not fit beside those that cannot leave, or not at all; the message has the bytes."""


@final
class Budget:
    """A limit in bytes, and what is taken of it.

    Attributes:
        limit: bytes there are.
        peak: most that were ever taken.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.peak = 0
        self._held: dict[tuple[str, str], int] = {}

    @property
    def used(self) -> int:
        """Bytes taken."""
        return sum(self._held.values())

    @property
    def free(self) -> int:
        """Bytes left."""
        return self.limit - self.used

    def take(self, owner: str, part: str, num_bytes: int) -> None:
        """Take bytes for one part of an owner, which has none for it yet; they are there: the caller made room."""
        assert (owner, part) not in self._held, f"{owner} has its {part} twice"
        assert num_bytes <= self.free, f"{num_bytes} bytes for {owner}'s {part}, {self.free} of {self.limit} are free"
        self._held[owner, part] = num_bytes
        self.peak = max(self.peak, self.used)

    def give_back(self, owner: str, part: str) -> None:
        """Give a part's bytes back; a part that has none is left alone."""
        self._held.pop((owner, part), None)

    def held(self, owner: str) -> int:
        """Bytes of all parts of an owner."""
        return sum(size for (name, _), size in self._held.items() if name == owner)
