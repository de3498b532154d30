"""The giving side: pages of prompts that others will go on with, on their way into host memory and kept there.

Pages leave the device as the prompt is computed, chunk by chunk, so that when it is done the last chunk's are left.
They are kept in the logical layout until they are fetched and acknowledged, or their lease ends; the device's own are
free as soon as the request has ended. Bounded in bytes. Called where the engine is stepped, all but `rows`, `renew` and
`release`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.disaggregation.stats import TransferStats
from jaxllm.disaggregation.wire import span_names
from jaxllm.engine.engine import Engine
from jaxllm.kv.layout import PageLayout
from jaxllm.kv.logical import Rows, row_bytes, rows_of
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.scheduling.request import Request

_FETCH_SECONDS = 30.0
_MOST_GONE = 256
_GONE = "these pages are not kept here: they were fetched and acknowledged, or their lease ended"


class Unknown(LookupError):
    """Nobody keeps these pages here (any more)."""


@dataclass(slots=True, eq=False)
class Export:
    """One prompt's pages.

    Attributes:
        pages: page index -> its rows, on their way or here.
        num_tokens: that can be had so far; all that are computed once the request has ended.
        ended: on the performance clock, when its request did; None before.
        first_token: nothing before it is kept.
        expires: on the monotonic clock; None while the prompt is being computed.
    """

    transfer_id: str
    request: Request
    pages: dict[int, Future[Rows]] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    first_token: int = 0
    expires: float | None = None
    ended: float | None = None
    next: int = 0
    is_given_up: bool = False


class Exports:
    """All that one engine keeps for others.

    Args:
        engine: whose pages.
        root: what decides a page's content beside tokens, on both sides.
        lease_seconds: from the end of a request, and from each fetch or renewal.
        max_bytes: kept at most; a prompt for which there is no room is not given away.
    """

    def __init__(self, engine: Engine, root: str, *, lease_seconds: float, max_bytes: int, stats: TransferStats):
        self.stats = stats
        self.num_expired = 0
        self._engine, self._root, self._lease, self._max_bytes = engine, root, lease_seconds, max_bytes
        self._exports: dict[str, Export] = {}
        self._gone: deque[str] = deque(maxlen=_MOST_GONE)  # whoever waits for one of these need not wait longer
        self._row_bytes = row_bytes(engine.memory.layout, engine.memory.num_layers)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="kv-export")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._exports)

    def __contains__(self, transfer_id: str) -> bool:
        return transfer_id in self._exports

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        size = self._engine.memory.layout.page_size * self._row_bytes
        with self._lock:
            return sum(len(export.pages) for export in self._exports.values()) * size

    def begin(self, request: Request, transfer_id: str) -> Export:
        """Keep this request's pages as they come; `finish` is called with its end. Raises ValueError: a name in use."""
        export = Export(transfer_id, request, token_ids=list(request.token_ids))
        with self._lock:
            if transfer_id in self._exports:
                raise ValueError("transfer_id is in use; give every request its own")
            self._exports[transfer_id] = export
        return export

    def pump(self) -> None:
        """Take out what has been computed since, and forget what nobody fetched."""
        now = time.monotonic()
        with self._lock:
            exports = list(self._exports.values())
        for export in exports:
            if export.expires is not None and export.expires < now:
                self.num_expired += 1
                self.release(export.transfer_id)
            elif export.request.finished and export.expires is None:
                self.release(export.transfer_id)  # it ended without a result
            elif export.request.pages and export.request.held.load is None and not export.request.finished:
                self._take(export, min(export.request.held.num_computed, export.request.num_prompt), whole=True)

    def finish(self, export: Export) -> None:
        """Its request ends now, and still has its pages."""
        request = export.request
        num_tokens = min(request.held.num_computed, len(request.token_ids) - 1)
        self._take(export, num_tokens, whole=False)
        if export.is_given_up:
            return
        export.token_ids, export.num_tokens = request.token_ids[:num_tokens], num_tokens
        export.first_token = request.held.num_dropped * self._engine.memory.layout.page_size
        export.expires = time.monotonic() + self._lease
        self.stats.handed_over += 1
        export.ended = ended = time.perf_counter()
        if (last := next(reversed(export.pages.values()), None)) is not None:
            last.add_done_callback(lambda _: self._count_exposed(time.perf_counter() - ended))

    def _take(self, export: Export, num_tokens: int, *, whole: bool) -> None:
        """Take pages out: whole batches while the prompt is computed, at its end all that is left."""
        request, size = export.request, self._engine.memory.layout.page_size
        first = max(export.next, self._engine.memory.pools[request.replica].first_visible(request.num_prompt))
        last = num_tokens // size // MOVE_BATCH * MOVE_BATCH if whole else -(-num_tokens // size)
        if first >= last or export.is_given_up:
            return
        if self.num_bytes + (last - first) * size * self._row_bytes > self._max_bytes:
            export.is_given_up = True
            self.release(export.transfer_id)
            return
        offset = request.replica * self._engine.memory.pools[request.replica].num_pages
        for start in range(first, last, MOVE_BATCH):
            indices = range(start, min(start + MOVE_BATCH, last))
            slabs = self._engine.runner.take_pages([offset + request.pages[i] for i in indices])
            self._keep(export, indices, slabs)
        export.next = last
        export.num_tokens = min(last * size, num_tokens)

    def _keep(self, export: Export, indices: range, slabs: Sequence[Any]) -> None:
        layout = self._engine.memory.layout
        for i, slab in zip(indices, slabs, strict=True):
            export.pages[i] = self._threads.submit(self._rows, slab, layout)

    def _rows(self, slab: Any, layout: PageLayout) -> Rows:
        """In a thread: one page in host memory."""
        started = time.perf_counter()
        rows = rows_of([slab], layout, 0, layout.page_size)
        with self._lock:
            self.stats.seconds += time.perf_counter() - started
            self.stats.pages += 1
            self.stats.bytes += layout.page_size * self._row_bytes
        return rows

    def _count_exposed(self, seconds: float) -> None:
        with self._lock:
            self.stats.exposed_seconds += seconds

    # From any thread.

    def has(self, transfer_id: str, num_tokens: int) -> bool | None:
        """Whether so many tokens of a request can be had now; None: nobody has asked for it yet. Raises Unknown."""
        with self._lock:
            export = self._exports.get(transfer_id)
            if export is None and transfer_id in self._gone:
                raise Unknown(_GONE)
        return None if export is None else export.num_tokens >= num_tokens or export.ended is not None

    def seconds_since_end(self, transfer_id: str) -> float | None:
        """How long ago the request ended here; None while its prompt is being computed, or where nobody knows it."""
        with self._lock:
            export = self._exports.get(transfer_id)
        return None if export is None or export.ended is None else time.perf_counter() - export.ended

    def rows(self, transfer_id: str, spans: Sequence[tuple[int, int]], names: Sequence[str], salt: str) -> list[Rows]:
        """The rows of these spans of tokens; renews the lease. May wait for copies that are under way.

        Raises:
            Unknown: nobody keeps them.
            ValueError: the names are those of other tokens.
        """
        with self._lock:
            export = self._exports.get(transfer_id)
            if export is None:
                raise Unknown(_GONE)
            if export.expires is not None:
                export.expires = time.monotonic() + self._lease
        if any(not export.first_token <= start < stop <= export.num_tokens for start, stop in spans):
            raise ValueError(f"only tokens {export.first_token} to {export.num_tokens} are kept of this request")
        stops = [stop for _, stop in spans]
        if stops != sorted(stops) or span_names(self._root, salt, export.token_ids, stops) != list(names):
            raise ValueError("the names are those of other tokens than this request's")
        return [self._cut(export, start, stop) for start, stop in spans]

    def _cut(self, export: Export, start: int, stop: int) -> Rows:
        size = self._engine.memory.layout.page_size
        first = start // size
        if any(i not in export.pages for i in range(first, (stop - 1) // size + 1)):
            raise ValueError("these tokens are out of sight for what follows the prompt, and not kept")
        pages = [export.pages[i].result(_FETCH_SECONDS) for i in range(first, (stop - 1) // size + 1)]
        rows = pages[0] if len(pages) == 1 else [np.concatenate(leaves, axis=2) for leaves in zip(*pages, strict=True)]
        return [row[:, :, start - first * size : stop - first * size] for row in rows]

    def renew(self, transfer_ids: Sequence[str]) -> int:
        """Somebody still wants these pages: their leases begin anew. How many of them are kept."""
        with self._lock:
            kept = [export for name in transfer_ids if (export := self._exports.get(name)) is not None]
            for export in kept:
                if export.expires is not None:
                    export.expires = time.monotonic() + self._lease
        return len(kept)

    def release(self, transfer_id: str) -> bool:
        """Forget a request's pages; whether there were any."""
        with self._lock:
            self._gone.append(transfer_id)
            return self._exports.pop(transfer_id, None) is not None
