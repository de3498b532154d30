"""Where page contents go that leave the device, and how they come back: host memory, then disk.

The page pool's evictions and the scheduler's preemptions in; two lists of moves out, which whoever owns the arrays
carries out (`jaxllm.kv.mover`). Plain Python: keys and page numbers, no arrays. Keys are the prefix cache's hashes,
or names of their own for swapped requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from jaxllm.scheduling.host_pool import HostPool


class LowerTier(Protocol):
    """The tier after the host: the disk store, as far as deciding goes."""

    def __contains__(self, key: bytes) -> bool: ...


@dataclass(frozen=True, slots=True)
class Swapped:
    """A preempted request's cache: its length in tokens, and the host's key of each page index."""

    num_tokens: int
    keys: dict[int, bytes]


class Offer(Protocol):
    """What another engine has computed of a request, and gives away (see `jaxllm.disaggregation`).

    Attributes:
        num_tokens: computed there, from the first on.
        first_token: tokens before this one are not given: nothing to come sees them.
        required: where it fails the request shall not be computed here instead, but end with the error that this is.
    """

    num_tokens: int
    first_token: int
    required: Exception | None

    def want(self, start: int, stop: int) -> None:
        """The tokens `[start, stop)`, of one page of the receiver, will be fetched. Called where its engine steps."""
        ...

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[Any | None]:
        """The slabs of these spans in the receiver's layout, None where one cannot be had. In a thread; may wait."""
        ...

    def close(self) -> None:
        """No more is wanted; whoever keeps the pages may forget them. May be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """One page's tokens `[start, stop)` of an offer: a source of a load."""

    offer: Offer
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class Load:
    """Pages on their way up for one request.

    Attributes:
        owner, replica: whose request it is for.
        keys, pages: what goes where; `sources` are the host's slabs, a `Span` where another engine gives it, None where
            the disk has it.
        num_tokens: how many tokens of the request are computed when it is done.
        ended: arrived, failed or not wanted any more.
    """

    owner: Any
    keys: list[bytes]
    pages: list[int]
    sources: list[Any]
    num_tokens: int
    replica: int = 0
    ended: bool = False


@dataclass(slots=True)
class MoveStats:
    """Sums since the start: hits are pages of prefixes that were loaded, seconds what moves took beside the engine."""

    pages_out: int = 0
    pages_in: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    swaps_out: int = 0
    swaps_in: int = 0
    offered_pages: int = 0
    failed_loads: int = 0
    seconds_out: float = 0.0
    seconds_in: float = 0.0


def swap_is_cheaper(num_bytes: float, num_tokens: int, copy_bytes_per_s: float, prefill_tokens_per_s: float) -> bool:
    """Whether copying a cache out and back takes less time than computing it again; False where a rate is unknown."""
    if not copy_bytes_per_s or not prefill_tokens_per_s:
        return False
    return 2 * num_bytes / copy_bytes_per_s < num_tokens / prefill_tokens_per_s


@dataclass(slots=True)
class Tiers:
    """Decides what is kept in the tiers under the device.

    Attributes:
        page_bytes: of one page over all layers and devices.
        preemption: "swap" or "recompute" preempted requests, or ("auto") what `swap_is_cheaper` says.
        prefill_rate: tokens per second that the engine computes, 0 while unknown.
        copy_rate: bytes per second between device and host, measured by whoever copies.
        evictions: `(page, key)` to copy to the host before the device does anything else with the page.
        loads: to be begun.
    """

    host: HostPool
    disk: LowerTier | None
    page_bytes: int
    preemption: str = "auto"
    prefill_rate: Callable[[], float] = lambda: 0.0
    copy_rate: float = 0.0
    evictions: list[tuple[int, bytes]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    stats: MoveStats = field(default_factory=MoveStats)
    _under_way: dict[tuple[int, bytes], Load] = field(default_factory=dict)
    _num_swaps: int = 0

    def evicted(self, page: int, digest: bytes) -> None:
        """A prefix page leaves the device: keep its content in the host, unless it is there."""
        if digest in self.host:
            self.host.touch(digest)
        elif self.host.reserve(digest):
            self.evictions.append((page, digest))

    def has(self, digest: bytes) -> bool:
        """Whether a page can be loaded."""
        return self.host.has(digest) or (self.disk is not None and digest in self.disk)

    def loading(self, digest: bytes, replica: int = 0) -> Load | None:
        """The load that is bringing this page up for a replica, if any."""
        return self._under_way.get((replica, digest))

    def begin(
        self,
        owner: Any,
        keys: Sequence[bytes],
        pages: Sequence[int],
        num_tokens: int,
        replica: int = 0,
        spans: Mapping[bytes, Span] = MappingProxyType({}),
    ) -> Load:
        """Bring pages up for a request; `pages` are allocated, and nobody else knows them.

        What is neither in the host nor on the disk comes from the `spans` of another engine's offer.
        """
        sources = [self._source(key, spans) for key in keys]
        load = Load(owner, list(keys), list(pages), sources, num_tokens, replica)
        self._under_way.update(dict.fromkeys([(replica, key) for key in keys], load))
        self.loads.append(load)
        return load

    def _source(self, key: bytes, spans: Mapping[bytes, Span]) -> Any | None:
        if key not in spans or self.has(key):
            return self.host.get(key)
        span = spans[key]
        span.offer.want(span.start, span.stop)
        return span

    def end(self, load: Load) -> None:
        """A load has arrived, failed, or is not wanted any more."""
        load.ended = True
        for key in load.keys:
            self._under_way.pop((load.replica, key), None)

    def arrived(self, load: Load, flags: Sequence[bool], swapped: Swapped | None) -> None:
        """Count what a load brought, and end it; a swapped cache that is back needs no place in the host."""
        self.end(load)
        self.stats.pages_in += sum(flags)
        self.stats.failed_loads += not all(flags)
        if swapped is not None:
            self.forget(swapped)
            self.stats.swaps_in += all(flags)
            return
        for source, is_here in zip(load.sources, flags, strict=True):
            if isinstance(source, Span):
                self.stats.offered_pages += is_here
            elif source is None:
                self.stats.disk_hits += is_here
            else:
                self.stats.host_hits += is_here

    def swap_out(self, pages: Sequence[int], num_tokens: int) -> Swapped | None:
        """Keep a preempted request's cache in the host, where that is wanted, cheaper and possible.

        Args:
            pages: the request's, 0 where it has none any more; they are about to be freed.
            num_tokens: computed so far.
        """
        indices = [i for i, page in enumerate(pages) if page]
        if not indices or not self.host.has_room(len(indices)) or not self._should_swap(len(indices), num_tokens):
            return None
        self._num_swaps += 1
        keys = {i: b"swap %d %d" % (self._num_swaps, i) for i in indices}
        for i, key in keys.items():
            assert self.host.reserve(key, pin=True), "there was room for it"
            self.evictions.append((pages[i], key))
        self.stats.swaps_out += 1
        return Swapped(num_tokens, keys)

    def _should_swap(self, num_pages: int, num_tokens: int) -> bool:
        if self.preemption != "auto":
            return self.preemption == "swap"
        return swap_is_cheaper(num_pages * self.page_bytes, num_tokens, self.copy_rate, self.prefill_rate())

    def forget(self, swapped: Swapped) -> None:
        """Drop a swapped cache: it is back, or its request has ended."""
        for key in swapped.keys.values():
            self.host.drop(key)

    def take_evictions(self) -> list[tuple[int, bytes]]:
        """The copies to make now, without those that nobody wants any more."""
        evictions, self.evictions = [(page, key) for page, key in self.evictions if self.host.expects(key)], []
        return evictions

    def take_loads(self) -> list[Load]:
        """The loads to begin now, after the copies of `take_evictions`: what these brought down may come up again."""
        loads, self.loads = [load for load in self.loads if not load.ended], []
        for load in loads:
            known = zip(load.keys, load.sources, strict=True)
            load.sources = [self.host.get(key) if slab is None else slab for key, slab in known]
        return loads

    def reset(self) -> None:
        """Forget what is in the host and under way (after a failed iteration, say); the disk keeps what it has."""
        for load in list(self._under_way.values()):
            self.end(load)
        self.host.clear()
        self.evictions.clear()
        self.loads.clear()
