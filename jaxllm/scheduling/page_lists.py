"""Which pages a running request has, from its first to its last: found, allocated, shared, copied, given up.

The scheduler says who runs and who makes way; this keeps requests' page lists and the pool in step with that. Plain
Python: page numbers, no arrays. What has to move as a consequence is left in `copies` and in the tiers' lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Held, Request
from jaxllm.scheduling.reuse import Found, find_reusable
from jaxllm.scheduling.tiers import Load, Span, Tiers


class PageLists:
    """Requests' pages in one pool, and in the tiers below it, where there are any.

    The tiers serve every replica: for them page `p` of this pool is page `first_page + p` of the arrays.
    """

    def __init__(self, pool: PagePool, tiers: Tiers | None = None, first_page: int = 0):
        self.pool = pool
        self.tiers = tiers
        self.first_page = first_page
        self.num_copies = 0
        self._copies: list[tuple[int, int]] = []
        if tiers is not None:
            pool.on_evict = lambda page, digest: tiers.evicted(first_page + page, digest)

    def take_copies(self) -> list[tuple[int, int]]:
        """The (from, to) pages to copy before the plan that is being made writes anything."""
        copies, self._copies = self._copies, []
        self.num_copies += len(copies)
        return copies

    def reserve(self, request: Request, spare: int) -> bool:
        """Give a request pages for all it has, reusing what is cached; `spare` pages are left free.

        True: its pages are there, though what is in them may be on its way up (`held.load`).
        """
        pool, found = self.pool, find_reusable(request, self.pool, self.tiers)
        total = pool.pages_for(request.num_tokens)
        missing = total - len(found.pages) + len(found.keys)
        tail = int(pool.shares_tail(found.pages, found.num_tokens))
        new_pages = pool.allocate(missing + tail) if missing + tail + spare <= pool.num_free else None
        if new_pages is None:
            pool.free([page for page in found.pages if page])
            return False
        self._start(request, found, new_pages)
        if tail:
            self._own_tail(request, new_pages[-1])
        return True

    def _start(self, request: Request, found: Found, new_pages: list[int]) -> None:
        """Put together the pages found and new ones, first those that a lower tier fills."""
        new = iter(new_pages)
        pages = [next(new) if page is None else page for page in found.pages]
        extent = self.pool.pages_for(request.num_tokens) - len(pages)
        held = request.held = Held(pages=pages + [next(new) for _ in range(extent)], swapped=request.held.swapped)
        held.num_published = next((i for i in found.keys), found.num_tokens // self.pool.page_size)
        held.num_published = max(held.num_published, found.num_headless)
        if found.keys:
            assert self.tiers is not None, "only a lower tier has keys"
            targets = [self.first_page + held.pages[i] for i in found.keys]
            keys = list(found.keys.values())
            held.load = self.tiers.begin(
                request, keys, targets, found.num_tokens, replica=request.replica, spans=found.spans
            )
        else:
            held.num_computed = found.num_tokens
        if not found.spans:
            self.decline(request)  # all of it is here already
        if request.num_cached is None:
            request.num_cached = held.num_computed
            self.pool.count_query(request.num_tokens, held.num_computed)

    def share(self, parent: Request, child: Request) -> None:
        """Put `child`, whose tokens are the parent's, on the parent's pages."""
        above, held = parent.held, child.held
        held.num_computed = child.num_cached = min(above.num_computed, child.num_tokens - 1)
        full = held.num_computed // self.pool.page_size
        held.pages = self.pool.share(above.pages[: self.pool.pages_for(held.num_computed)])
        held.num_published, held.num_dropped = min(above.num_published, full), above.num_dropped
        child.page_hashes = parent.page_hashes[:full]

    def loaded(self, load: Load, arrived: Sequence[bool]) -> bool:
        """The device has what a load brought. False: not all of it, and its request must start again."""
        assert self.tiers is not None
        request: Request = load.owner
        held = request.held
        self.tiers.arrived(load, arrived, held.swapped)
        held.load = None
        if held.swapped is None:
            # A part-filled page of an offer has another name.
            index = {digest: i for i, digest in enumerate(request.page_hashes)}
            for page, digest, is_here in zip(load.pages, load.keys, arrived, strict=True):
                if is_here and digest in index:
                    self._publish(request, index[digest], page - self.first_page)
        held.swapped = None
        self.decline(request)
        if not all(arrived):
            return False
        held.num_computed = min(load.num_tokens, request.num_tokens - 1)
        is_offered = any(isinstance(source, Span) for source in load.sources)
        if request.num_cached == 0 and not request.num_preemptions and not is_offered:
            request.num_cached = load.num_tokens
            self.pool.num_hit_tokens += load.num_tokens
        return True

    def is_loading_for(self, request: Request) -> bool:
        """Whether the first page that a request lacks is on its way up for another."""
        if self.tiers is None or request.held.swapped is not None or not self.pool.enable_prefix_caching:
            return False
        digests = request.page_hashes = self.pool.hashes(request.token_ids, request.page_salt, request.page_hashes)
        missing = next((digest for digest in digests if not self.pool.has(digest)), None)
        return missing is not None and self.tiers.loading(missing, request.replica) is not None

    def missing(self, request: Request, num_tokens: int) -> int:
        """Pages that a request lacks to grow to `num_tokens`."""
        return max(0, self.pool.pages_for(num_tokens) - len(request.held.pages))

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Get pages up to `num_tokens`, and a page of its own to write into; False where there are too few."""
        tail = int(self.pool.shares_tail(request.held.pages, request.held.num_computed))
        new_pages = self.pool.allocate(self.missing(request, num_tokens) + tail)
        if new_pages is None:
            return False
        if tail:
            self._own_tail(request, new_pages.pop())
        request.held.pages += new_pages
        return True

    def _own_tail(self, request: Request, page: int) -> None:
        """Copy on write: the next token goes into a page that others read, so it gets one of its own."""
        held = request.held
        i, offset = divmod(held.num_computed, self.pool.page_size)
        if offset:
            self._copies.append((held.pages[i], page))
        self.pool.free(held.pages[i : i + 1])
        held.pages[i] = page

    def truncate(self, request: Request, length: int) -> bool:
        """Give up what was computed beyond `length` tokens. False: pages that are needed again are gone."""
        held, kept = request.held, self.pool.pages_for(length)
        held.num_computed = min(held.num_computed, length)
        held.num_published = min(held.num_published, length // self.pool.page_size)
        self.pool.free(held.pages[kept:])
        del held.pages[kept:]
        return held.num_dropped <= self.pool.first_visible(max(0, held.num_computed - 1))

    def shrink(self, request: Request, num_computed: int) -> None:
        """Fewer tokens came than could have: nothing in flight writes into the pages beyond those that still can."""
        held, kept = request.held, self.pool.pages_for(num_computed)
        held.num_computed = num_computed
        self.pool.free(held.pages[kept:])
        del held.pages[kept:]

    def begin_plan(self, request: Request) -> None:
        """Between plans: free the pages out of every window.

        Iterations in flight that read them come before any new owner's.
        """
        held = request.held
        held.num_planned = held.num_computed
        if self.pool.window is None or held.load is not None:
            return
        seen = self.pool.first_visible(max(0, held.num_computed - request.num_unsure))
        for i in range(held.num_dropped, seen):
            self.pool.free(held.pages[i : i + 1])
            held.pages[i] = 0
        held.num_dropped = max(held.num_dropped, seen)

    def publish(self, request: Request, num_known: int) -> None:
        """Make full pages findable whose tokens are known and computed (or about to be, in the order of iterations)."""
        held = request.held
        full = min(held.num_computed, num_known) // self.pool.page_size
        if not self.pool.enable_prefix_caching or full <= held.num_published:
            return
        if full > len(request.page_hashes):
            known = request.token_ids[: full * self.pool.page_size]
            request.page_hashes = self.pool.hashes(known, request.page_salt, request.page_hashes)
        for i in range(held.num_published, full):
            self._publish(request, i, held.pages[i])
        held.num_published = full

    def _publish(self, request: Request, i: int, page: int) -> None:
        """Make the page findable that has the request's tokens of index `i`."""
        publish_page(self.pool, page, request.page_hashes, i, request.token_ids)

    def swap_out(self, request: Request) -> None:
        """Keep the cache of a request that is being preempted in the host, where the tiers say so."""
        held = request.held
        if self.tiers is not None and held.load is None:
            num_sure = max(0, held.num_computed - request.num_unsure)
            filled = held.pages[: self.pool.pages_for(num_sure)]
            filled = [self.first_page + page if page else 0 for page in filled]
            held.swapped = self.tiers.swap_out(filled, num_sure)

    def release(self, request: Request) -> None:
        """Take a request's pages away, all but what is swapped out; a load for them is not wanted any more."""
        held = request.held
        if held.load is not None and self.tiers is not None:
            self.tiers.end(held.load)
        self.pool.free(held.pages)
        request.held = Held(swapped=held.swapped)

    def decline(self, request: Request) -> None:
        """No more is wanted of what another engine offers."""
        if request.offer is not None:
            request.offer.close()
            request.offer = None

    def let_go(self, request: Request) -> list[int]:
        """A running request's pages for whoever takes the request elsewhere: theirs until they free them."""
        self.publish(request, len(request.token_ids))
        return self.pool.share(request.held.pages)

    def forget(self, request: Request) -> None:
        """What the host kept for a request may go: it has ended, or its tokens have changed."""
        self.decline(request)
        if request.held.swapped is not None and self.tiers is not None:
            self.tiers.forget(request.held.swapped)
            request.held.swapped = None

    def reset(self) -> None:
        """Forget the copies that were to be made."""
        self._copies = []


def publish_page(pool: PagePool, page: int, digests: Sequence[bytes], i: int, token_ids: Sequence[int]) -> None:
    """Make a page findable that has the tokens of index `i` of a sequence."""
    tokens = () if pool.events is None else token_ids[i * pool.page_size : (i + 1) * pool.page_size]
    pool.publish(page, digests[i], digests[i - 1] if i else None, tokens)


def utilization(running: Sequence[Request], page_size: int) -> float:
    """Share of the token slots in requests' pages that tokens fill; 1 where nothing runs."""
    tokens = slots = 0
    for request in running:
        tokens += request.num_tokens - request.held.num_dropped * page_size
        slots += (len(request.held.pages) - request.held.num_dropped) * page_size
    return min(1.0, tokens / slots) if slots else 1.0
