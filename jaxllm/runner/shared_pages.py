"""The host tier of several processes: each keeps its own devices' parts of every slab, under the same number.

Process 0 decides; what it brings down, puts back and forgets, the others do too. A slab is forgotten when nothing on
process 0 refers to it any more, so whoever keeps slabs there needs to know nothing of the others.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.kv.host_memory import DevicePages, HostMemory
from jaxllm.runner.messages import BringDown, Forget, PutBack, encode


class NumberedSlab:
    """This process's parts of a slab, and the number under which the others have theirs."""

    def __init__(self, number: int, parts: Any):
        self.number, self.parts = number, parts

    def is_ready(self) -> bool:
        """Whether the copy is complete."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.parts) if not isinstance(leaf, np.ndarray))

    def block_until_ready(self) -> NumberedSlab:
        """Wait for the copy."""
        jax.block_until_ready(self.parts)
        return self


class SharedPages:
    """Process 0's end. Like `LocalPages`, whose slabs are `NumberedSlab`s here."""

    def __init__(self, pages: DevicePages, memory: HostMemory, announce: Callable[[bytes], None]):
        self._pages, self.memory, self._announce = pages, memory, announce
        self._next = 0
        self._forgotten: deque[int] = deque()  # from any thread

    def bring_down(self, pages: Sequence[int]) -> list[NumberedSlab]:
        """See `LocalPages`."""
        self._forget()
        first, self._next = self._next, self._next + len(pages)
        self._announce(encode(BringDown(first, tuple(pages))))
        taken = enumerate(self._pages.take_pages(pages), first)
        slabs = [NumberedSlab(number, self.memory.down(slab)) for number, slab in taken]
        for slab in slabs:
            weakref.finalize(slab, self._forgotten.append, slab.number)
        return slabs

    def bring_up(self, slab: NumberedSlab) -> tuple[NumberedSlab, Any]:
        """See `LocalPages`; the others bring theirs up when it is put into its page."""
        return slab, self.memory.up(slab.parts)

    def put_pages(self, pages: Sequence[int], slabs: Sequence[tuple[NumberedSlab, Any]]) -> None:
        """See `LocalPages`."""
        self._announce(encode(PutBack(tuple(pages), tuple(slab.number for slab, _ in slabs))))
        self._pages.put_pages(pages, [here for _, here in slabs])

    def _forget(self) -> None:
        numbers = tuple(self._forgotten.popleft() for _ in range(len(self._forgotten)))
        if numbers:
            self._announce(encode(Forget(numbers)))


class Shelf:
    """Another process's end: its parts of the slabs that process 0 has."""

    def __init__(self, pages: DevicePages, memory: HostMemory):
        self._pages, self._memory = pages, memory
        self._parts: dict[int, Any] = {}

    def obey(self, message: BringDown | PutBack | Forget) -> None:
        """Do what process 0 has done."""
        if isinstance(message, BringDown):
            taken = enumerate(self._pages.take_pages(message.pages), message.first)
            self._parts |= {number: self._memory.down(slab) for number, slab in taken}
        elif isinstance(message, PutBack):
            slabs = [self._memory.up(self._parts[number]) for number in message.numbers]
            self._pages.put_pages(message.pages, slabs)
        else:
            for number in message.numbers:
                del self._parts[number]
