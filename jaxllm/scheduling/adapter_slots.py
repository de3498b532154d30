"""Which adapter lies in which slot of the device's arrays: least recently used ones make way. Plain Python.

Slot 0 stands for none. A slot is held by the running requests of its adapter; what nobody holds stays until its slot is
needed. A request whose adapter finds no slot waits, and holds up nobody else, but for one thing: the requests behind it
do not take up again the slot that is to fall free for it, so its turn comes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol


class Adapter(Protocol):
    """What a slot holds. Attributes: `identity` changes with its numbers; `arrays` are these, for the runner."""

    @property
    def identity(self) -> str: ...
    @property
    def arrays(self) -> Any: ...


class AdapterSlots:
    """The slots of one engine, `1 .. num_slots`.

    Attributes:
        form: an adapter as this engine takes it, where adapters are made ready for another one.
    """

    def __init__(self, num_slots: int):
        self.num_slots = num_slots
        self.form: Callable[[Adapter], Adapter] = lambda adapter: adapter
        self.num_loads = 0
        self.reset()

    def reset(self) -> None:
        """No slot holds anything (the arrays start anew)."""
        self._slot_of: OrderedDict[str, int] = OrderedDict()  # by identity, least recently used first
        self._users: dict[str, int] = {}
        self._free = list(range(self.num_slots, 0, -1))
        self._closing: set[str] = set()  # take no more requests while this plan is made
        self._loads: list[tuple[int, Any]] = []

    def begin_plan(self) -> None:
        """Requests are about to be tried, in the order of their ranks."""
        self._closing.clear()

    def has_room(self, adapter: Adapter | None) -> bool:
        """Whether a request with this adapter may start now; where not, a slot is kept for it."""
        if adapter is None:
            return True
        if adapter.identity in self._slot_of:
            return adapter.identity not in self._closing
        if self._free or any(identity not in self._users for identity in self._slot_of):
            return True
        leaving = next((identity for identity in self._slot_of if identity not in self._closing), None)
        if leaving is not None:
            self._closing.add(leaving)
        return False

    def hold(self, adapter: Adapter | None) -> int:
        """One more running request; the slot of its adapter. There is room (see `has_room`)."""
        if adapter is None:
            return 0
        identity = adapter.identity
        if identity not in self._slot_of:
            self._slot_of[identity] = self._free.pop() if self._free else self._evict()
            self._loads.append((self._slot_of[identity], self.form(adapter)))
            self.num_loads += 1
        self._slot_of.move_to_end(identity)
        self._users[identity] = self._users.get(identity, 0) + 1
        return self._slot_of[identity]

    def _evict(self) -> int:
        idle = next(identity for identity in self._slot_of if identity not in self._users)
        return self._slot_of.pop(idle)

    def release(self, adapter: Adapter | None) -> None:
        """A request that held its slot runs no more."""
        if adapter is None:
            return
        self._users[adapter.identity] -= 1
        if not self._users[adapter.identity]:
            del self._users[adapter.identity]

    def take_loads(self) -> list[tuple[int, Any]]:
        """(slot, adapter) to be written before anything that is planned from now on."""
        loads, self._loads = self._loads, []
        return loads
