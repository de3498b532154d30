"""The KV cache of an engine on paper: page pools without pages, and the tiers below them on modelled links.

What is kept, evicted and loaded the engine's own `Tiers` and `HostPool` decide; here a move takes the time that its
bytes take, and turns the engine's clock where nothing else happens meanwhile. A page's content is nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.tiers import Load, Tiers
from jaxllm.simulation.clock import VirtualClock

_CONTENT = object()  # in the place of a slab


@dataclass(slots=True)
class PaperMemory:
    """Page pools without pages, and what is below them."""

    pools: list[PagePool]
    page_bytes: int
    tiers: Tiers | None = None
    mover: Any = None


class PaperDisk:
    """Keys of at most `capacity` pages, those that were not used for longest out first."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def write(self, key: bytes, _: Any) -> None:
        """A page leaves the host."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def read(self, key: bytes) -> None:
        """A page is used."""
        self._keys.move_to_end(key)


@dataclass(slots=True)
class PaperMover:
    """See `jaxllm.kv.mover.Mover`: loads follow each other up the link, evictions down it, neither in the other's way.

    Attributes:
        tiers: whose decisions take time here.
        clock: of the engine's host.
        link: bytes per second between host memory and the devices, each way.
        disk_rate: bytes per second of the disk.
        horizon: when somebody who sets it next looks at the engine: the clock is not turned further than that.
    """

    tiers: Tiers
    clock: VirtualClock
    link: float
    disk_rate: float
    disk: PaperDisk | None = None
    horizon: Callable[[], float] = lambda: float("inf")
    _up: float = 0.0  # when the link has brought up all that was asked for
    _down: float = 0.0
    _loads: list[tuple[float, Load]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tiers.copy_rate = self.link

    @property
    def is_moving(self) -> bool:
        """See `Mover`."""
        return bool(self._loads)

    def rest(self) -> None:
        """Turn the clock to the end of the next load."""
        if self._loads:
            self.clock.wait_until(min(self._loads[0][0], self.horizon()))

    def start(self) -> None:
        """See `Mover`."""
        tiers, now = self.tiers, self.clock.now
        if evictions := tiers.take_evictions():
            for _, key in evictions:
                tiers.host.fill(key, _CONTENT)
            seconds = len(evictions) * tiers.page_bytes / self.link
            self._down = max(self._down, now) + seconds
            tiers.stats.pages_out += len(evictions)
            tiers.stats.seconds_out += seconds
        for load in tiers.take_loads():
            seconds = self._seconds(load)
            self._up = max(self._up, now) + seconds
            tiers.stats.seconds_in += seconds
            self._loads.append((self._up, load))

    def _seconds(self, load: Load) -> float:
        """Pages from the disk are read first: the link waits for them."""
        below = [key for key, source in zip(load.keys, load.sources, strict=True) if source is None]
        for key in below:
            if self.disk is not None and key in self.disk:
                self.disk.read(key)
        num_bytes = self.tiers.page_bytes
        return len(load.keys) * num_bytes / self.link + len(below) * num_bytes / self.disk_rate

    def finish(self, loaded: Callable[[Load, Sequence[bool]], None]) -> int:
        """See `Mover`."""
        now, num_done = self.clock.now, 0
        while self._loads and self._loads[0][0] <= now:
            _, load = self._loads.pop(0)
            num_done += 1
            if not load.ended:
                loaded(load, [True] * len(load.keys))
        return num_done

    def reset(self) -> None:
        """See `Mover`."""
        self._loads.clear()

    def wait(self) -> None:
        """See `Mover`: what goes down is there at once, as far as deciding goes."""
