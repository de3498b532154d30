"""From one engine's devices to another's, in one process: pages stream over while their prompt is computed.

Two engines, stepped by one thread. Full pages of a prompt leave after each chunk, while the next is computed, and
become cached prefix pages of the receiver: whoever goes on there finds them by their hash, and what it has does not
travel. What is left when a request is handed over (a part-filled last page, say) is an offer, fetched as pages of a
lower tier are.

A batch has a fixed number of pages, and the bytes on their way are bounded. Where both sides lay pages out alike,
`jax.device_put` moves slabs between their shardings; else they are cut anew in the logical layout, in host memory.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxllm.disaggregation.stats import TransferStats
from jaxllm.engine.engine import Engine
from jaxllm.kv.logical import row_bytes, rows_of, slab_of
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.scheduling.page_lists import publish_page
from jaxllm.scheduling.request import Request

log = logging.getLogger(__name__)
_MOST_BYTES = 256 << 20  # taken out and not yet in the receiver's pages
_FETCH_SECONDS = 60.0
Spans = Sequence[tuple[int, int]]  # tokens [start, stop), each in one page of the receiver
Moved = tuple[list[Any], float]  # slabs on the receiver's devices, and the seconds that took


@dataclass(slots=True)
class _Stream:
    """A prompt whose pages leave as they are computed."""

    request: Request
    replica: int
    digests: list[bytes]
    next: int
    under_way: int = 0
    stopped: bool = False
    waits_since: float | None = None


@dataclass(frozen=True, slots=True)
class _Batch:
    """Pages of one stream on their way."""

    stream: _Stream
    spans: list[tuple[int, int]]
    slabs: Future[Moved]


@dataclass(slots=True, eq=False)
class LocalOffer:
    """What the source has computed of a request that it has let go: an `Offer`.

    Attributes:
        pages: of the source's replica, held until `close`; 0 where a page is gone.
    """

    passage: Passage
    replica: int
    pages: list[int]
    num_tokens: int
    first_token: int
    since: float
    required: Exception | None = None
    is_open: bool = True
    _slabs: dict[tuple[int, int], Future[Any]] = field(default_factory=dict)

    def want(self, start: int, stop: int) -> None:
        """See `Offer`."""
        if (start, stop) not in self._slabs:
            self._slabs[start, stop] = Future()
            self.passage.wanted.append((self, (start, stop)))

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[Any | None]:
        """See `Offer`. What the stepping thread does not hand over in time (it compiles, say) is computed again."""
        wait([self._slabs[span] for span in spans], _FETCH_SECONDS)
        return [slab.result() if (slab := self._slabs[span]).done() else None for span in spans]

    def arrived(self, spans: Spans, slabs: Sequence[Any]) -> None:
        """These can be fetched now."""
        for span, slab in zip(spans, slabs, strict=True):
            if not self._slabs[span].done():
                self._slabs[span].set_result(slab)

    def close(self, *, is_lost: bool = False) -> None:
        """See `Offer`; `is_lost`: the source has forgotten all pages."""
        if not self.is_open:
            return
        self.is_open = False
        if not is_lost:
            self.passage.source.memory.pools[self.replica].free(self.pages)
        for slab in self._slabs.values():
            if not slab.done():
                slab.set_result(None)
        self.passage.closed(self)


class Passage:
    """Carries pages from the engine `source` to the engine `target`; called by whoever steps both."""

    def __init__(self, source: Engine, target: Engine, *, most_bytes: int = _MOST_BYTES):
        self.source, self.target, self.stats = source, target, TransferStats()
        self.wanted: deque[tuple[LocalOffer, tuple[int, int]]] = deque()
        self._most_bytes, self._bytes = most_bytes, 0
        self._streams: dict[str, _Stream] = {}
        self._batches: deque[_Batch] = deque()
        self._fetches: deque[tuple[LocalOffer, list[tuple[int, int]], Future[Moved]]] = deque()
        self._offers: set[LocalOffer] = set()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv-passage")
        layouts = [dataclasses.replace(e.memory.layout, num_pages=1) for e in (source, target)]
        self._is_direct = layouts[0] == layouts[1]
        self._row_bytes = row_bytes(target.memory.layout, target.memory.num_layers)
        slab = target.memory.slab()
        self._structure = jax.tree.structure(slab)
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, slab)

    @property
    def is_busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._batches or self._fetches or self.wanted)

    def reset(self) -> None:
        """Forget everything: both engines start anew."""
        for offer in list(self._offers):
            offer.close(is_lost=True)
        self._streams.clear()
        self._batches.clear()
        self._fetches.clear()
        self.wanted.clear()
        self._bytes = 0

    # Streams: pages of prompts that are being computed.

    def is_streaming(self, request: Request) -> bool:
        """Whether pages of this request are on their way."""
        stream = self._streams.get(request.request_id)
        return stream is not None and stream.under_way > 0

    def is_waiting(self, request: Request) -> None:
        """The request has its first token: from now on somebody waits for its pages."""
        stream = self._streams.get(request.request_id)
        if stream is not None and stream.waits_since is None:
            stream.waits_since = time.perf_counter()

    def pump(self) -> None:
        """Put what has arrived into pages, and send off what may go."""
        self._land()
        self._answer()
        for stream in [stream for stream in self._streams.values() if stream.request.finished]:
            self.forget(stream.request)
        if self.target.memory.pools[0].enable_prefix_caching:
            for request in self.source.scheduler.running:
                if request.held.load is None:
                    self._stream(request)

    def forget(self, request: Request) -> None:
        """The request has ended, or is handed over: nothing more of it streams."""
        if (stream := self._streams.pop(request.request_id, None)) is not None:
            stream.stopped = True
            if stream.waits_since is not None:
                self.stats.exposed_seconds += time.perf_counter() - stream.waits_since

    def _stream(self, request: Request) -> None:
        pools = self.target.memory.pools
        if (stream := self._streams.get(request.request_id)) is None:
            digests = pools[0].hashes(request.token_ids[: request.num_prompt], request.page_salt)
            replica = max(range(len(pools)), key=lambda z: (pools[z].num_cached(digests), pools[z].num_free))
            first = pools[replica].first_visible(len(digests) * pools[replica].page_size)
            stream = self._streams[request.request_id] = _Stream(request, replica, digests, first)
        size = pools[0].page_size
        computed = min(request.held.num_computed // size, len(stream.digests))
        is_last = request.held.num_computed >= request.num_prompt
        while not stream.stopped and stream.next < computed and self._bytes < self._most_bytes:
            if computed - stream.next < MOVE_BATCH and not is_last:
                return  # a whole batch, or what is left at the end
            self._send(stream, range(stream.next, min(stream.next + MOVE_BATCH, computed)))

    def _send(self, stream: _Stream, indices: range) -> None:
        pool, request = self.target.memory.pools[stream.replica], stream.request
        stream.next = indices.stop
        missing = [i for i in indices if not pool.has(stream.digests[i])]
        self.stats.pages_skipped += len(indices) - len(missing)
        if not missing:
            return
        spans = [(i * pool.page_size, (i + 1) * pool.page_size) for i in missing]
        slabs = self._carry(request.replica, request.pages, spans)
        stream.under_way += 1
        self._batches.append(_Batch(stream, spans, slabs))

    def _land(self) -> None:
        while self._batches and self._batches[0].slabs.done():
            batch = self._batches.popleft()
            batch.stream.under_way -= 1
            self._bytes -= self._size(batch.spans)
            if not self._put(batch):
                batch.stream.stopped = True  # no room there: what is left goes when the request is handed over

    def _put(self, batch: _Batch) -> bool:
        """Make a batch cached pages of the receiver, unless it needs its free pages itself."""
        target, replica = self.target, batch.stream.replica
        pool, (slabs, seconds) = target.memory.pools[replica], batch.slabs.result()
        if len(slabs) + len(target.scheduler.running) > pool.num_free:
            return False
        pages = pool.allocate(len(slabs))
        assert pages is not None, "there was room"
        target.start_moves()
        first = replica * pool.num_pages
        target.runner.put_pages([first + page for page in pages], slabs)
        stream = batch.stream
        for page, (start, _) in zip(pages, batch.spans, strict=True):
            publish_page(pool, page, stream.digests, start // pool.page_size, stream.request.token_ids)
        pool.free(pages)
        self._count(batch.spans, seconds)
        return True

    # Offers: what is left of a request that is handed over.

    def offer(self, request: Request, pages: list[int], num_tokens: int, first_token: int) -> LocalOffer:
        """What the source keeps of a request that it has let go with these pages."""
        offer = LocalOffer(self, request.replica, pages, num_tokens, first_token, time.perf_counter())
        self._offers.add(offer)
        return offer

    def closed(self, offer: LocalOffer) -> None:
        """All of an offer has arrived, or nobody wants it any more."""
        self._offers.discard(offer)
        self.stats.exposed_seconds += time.perf_counter() - offer.since

    def _answer(self) -> None:
        """Take out what was wanted since, a batch at a time, and hand on what has come."""
        while self._fetches and self._fetches[0][2].done():
            offer, spans, moved = self._fetches.popleft()
            slabs, seconds = moved.result()
            self._bytes -= self._size(spans)
            offer.arrived(spans, slabs)
            self._count(spans, seconds)
        while self.wanted and self._bytes < self._most_bytes:
            offer, _ = self.wanted[0]
            spans = []
            while self.wanted and self.wanted[0][0] is offer and len(spans) < MOVE_BATCH:
                spans.append(self.wanted.popleft()[1])
            if offer.is_open:
                self._fetches.append((offer, spans, self._carry(offer.replica, offer.pages, spans)))

    def _count(self, spans: Spans, seconds: float) -> None:
        self.stats.seconds += seconds
        self.stats.pages += len(spans)
        self.stats.bytes += self._size(spans)

    def _size(self, spans: Spans) -> int:
        return sum(stop - start for start, stop in spans) * self._row_bytes

    # Moving.

    def _carry(self, replica: int, pages: Sequence[int], spans: Spans) -> Future[Moved]:
        """Slabs of the receiver, one per span, on its devices; `pages` are the request's in the source's replica."""
        layout, first = self.source.memory.layout, replica * self.source.memory.pools[replica].num_pages
        size = layout.page_size
        indices = sorted({i for start, stop in spans for i in range(start // size, (stop - 1) // size + 1)})
        slabs = dict(zip(indices, self.source.runner.take_pages([first + pages[i] for i in indices]), strict=True))
        self._bytes += self._size(spans)
        return self._threads.submit(self._moved, slabs, list(spans), time.perf_counter())

    def _moved(self, slabs: dict[int, Any], spans: Spans, started: float) -> Moved:
        """In a thread: cut anew where needed, and on the receiver's devices."""
        moved = [self._slab(slabs, start, stop) for start, stop in spans]
        moved = [jax.device_put(slab, self._shardings) for slab in moved]
        jax.block_until_ready(moved)
        return moved, time.perf_counter() - started

    def _slab(self, slabs: dict[int, Any], start: int, stop: int) -> Any:
        source, target = self.source.memory.layout, self.target.memory.layout
        if self._is_direct:
            return slabs[start // source.page_size]
        first = start // source.page_size
        parts = [slabs[i] for i in range(first, (stop - 1) // source.page_size + 1)]
        offset = first * source.page_size
        rows = rows_of(parts, source, start - offset, stop - offset)
        return slab_of(rows, target, start % target.page_size, self._structure)
