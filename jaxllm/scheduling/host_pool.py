"""The host tier's books: which page contents lie in host memory, and which goes when the room is needed.

Keys and slabs (one page's keys and values over all layers, opaque here) in, slabs out. Plain Python; it never looks
into a slab and moves nothing. Not safe for two threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class HostPool:
    """At most `capacity` slabs, least recently used out first; pinned ones stay until they are dropped.

    Args:
        capacity: slabs of one page each.
        on_evict: told the key and slab of what is pushed out.
    """

    def __init__(self, capacity: int, on_evict: Callable[[bytes, Any], None] | None = None):
        self.capacity = capacity
        self.num_evictions = 0
        self.on_evict = on_evict
        self._slabs: OrderedDict[bytes, Any] = OrderedDict()  # None: promised, but not copied yet
        self._pinned: dict[bytes, Any] = {}
        self._displaced: set[bytes] = set()  # evicted before their slab came

    def __len__(self) -> int:
        return len(self._slabs) + len(self._pinned)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slabs or key in self._pinned

    @property
    def num_pinned(self) -> int:
        """Slabs that cannot be evicted."""
        return len(self._pinned)

    def has(self, key: bytes) -> bool:
        """Whether the slab itself is here, not only its place."""
        return self._slabs.get(key) is not None or self._pinned.get(key) is not None

    def has_room(self, count: int) -> bool:
        """Whether `count` pinned slabs more would fit."""
        return self.num_pinned + count <= self.capacity

    def reserve(self, key: bytes, *, pin: bool = False) -> bool:
        """Keep a place for a slab, evicting what was not used for longest. False: everything else is pinned."""
        assert key not in self, "a page has one place in the host pool"
        while len(self) >= self.capacity:
            if not self._slabs:
                return False
            oldest, slab = self._slabs.popitem(last=False)
            self.num_evictions += 1
            if slab is None:
                self._displaced.add(oldest)
            elif self.on_evict is not None:
                self.on_evict(oldest, slab)
        self._displaced.discard(key)
        (self._pinned if pin else self._slabs)[key] = None
        return True

    def fill(self, key: bytes, slab: Any) -> None:
        """Put the slab into its place; where that was taken meanwhile, it is evicted at once."""
        for places in (self._slabs, self._pinned):
            if key in places:
                places[key] = slab
        if key in self._displaced:
            self._displaced.discard(key)
            if self.on_evict is not None:
                self.on_evict(key, slab)

    def expects(self, key: bytes) -> bool:
        """Whether anybody wants the slab of a promised place."""
        return key in self or (key in self._displaced and self.on_evict is not None)

    def touch(self, key: bytes) -> None:
        """Count a use."""
        if key in self._slabs:
            self._slabs.move_to_end(key)

    def get(self, key: bytes) -> Any | None:
        """The slab, now the most recently used one, or None."""
        self.touch(key)
        return self._slabs.get(key) if key in self._slabs else self._pinned.get(key)

    def drop(self, key: bytes) -> None:
        """Give a place back; unknown keys are ignored."""
        self._slabs.pop(key, None)
        self._pinned.pop(key, None)

    def clear(self) -> None:
        """Forget everything, without telling anybody."""
        self._displaced.clear()
        self._slabs.clear()
        self._pinned.clear()

    def unpinned(self) -> list[tuple[bytes, Any]]:
        """Keys and slabs that `reserve` may evict, oldest first."""
        return [(key, slab) for key, slab in self._slabs.items() if slab is not None]
