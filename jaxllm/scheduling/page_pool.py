"""The page pool: which page of the KV cache belongs to whom. Plain Python: page numbers, no arrays.

Pages have reference counts. A full page whose content is known has a hash, chained over its prefix (vLLM's
prefix caching); a hashed page that nobody references stays findable until it is the least recently used one and
somebody needs the room. Page 0 is never handed out: padding writes there, and in a list of pages it marks a place
whose page is gone because no query can see it any more (sliding windows).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol


class PageEvents(Protocol):
    """Who hears what can be found in the pool."""

    def stored(self, digest: bytes, parent: bytes | None, token_ids: Sequence[int]) -> None: ...
    def removed(self, digest: bytes) -> None: ...
    def cleared(self) -> None: ...


class PagePool:
    """Allocation, sharing and reuse of `num_pages` pages of `page_size` tokens.

    Args:
        window: keys that a query sees, its own included, where no layer sees more; None: all of them.
        namespace: what besides the tokens decides a page's content (the model, say); part of every hash.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        enable_prefix_caching: bool = True,
        namespace: str = "",
        window: int | None = None,
    ):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; at least 2 are needed: page 0 is reserved for padding")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.window = window
        self.on_evict: Callable[[int, bytes], None] | None = None  # a page's content is about to be lost
        self.events: PageEvents | None = None
        self._root = hashlib.sha256(namespace.encode()).digest()
        self._refs = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, 0, -1))  # free and without content worth keeping
        self._idle: OrderedDict[int, None] = OrderedDict()  # free but findable by hash, oldest first
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could hand out."""
        return len(self._blank) + len(self._idle)

    @property
    def num_usable(self) -> int:
        """All pages that requests can ever hold."""
        return self.num_pages - 1

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds and that a prefix may still be found in."""
        return len(self._idle)

    def with_content(self) -> list[int]:
        """Pages that somebody holds, or may find as a prefix."""
        return [page for page, count in enumerate(self._refs) if count or self._hash_of[page] is not None]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Hand out `count` pages, each with one reference, or None (and nothing changes) if there are too few."""
        if count > self.num_free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._evict(page)
        assert self._refs[page] == 0, f"page {page} handed out while referenced"
        self._refs[page] = 1
        return page

    def _evict(self, page: int) -> None:
        digest = self._hash_of[page]
        assert digest is not None, f"idle page {page} has no hash"
        if self.on_evict is not None:
            self.on_evict(page, digest)
        self._hash_of[page] = None
        del self._page_of[digest]
        self.num_evictions += 1
        if self.events is not None:
            self.events.removed(digest)

    def share(self, pages: Sequence[int]) -> list[int]:
        """One more reference on each: a second owner of pages that have one."""
        for page in pages:
            if page:
                assert self._refs[page] > 0, f"page {page} is shared by nobody"
                self._refs[page] += 1
        return list(pages)

    def shares_tail(self, pages: Sequence[int | None], num_tokens: int) -> bool:
        """Whether the token after the first `num_tokens` goes into a page that others hold, or may find, as well."""
        i = num_tokens // self.page_size
        page = pages[i] if i < len(pages) else None
        return page is not None and (self._refs[page] > 1 or self._hash_of[page] is not None)

    def has(self, digest: bytes) -> bool:
        """Whether a page with this content is on the device."""
        return digest in self._page_of

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference of each. The last pages of a sequence become the first to be evicted."""
        for page in reversed(pages):
            if not page:
                continue
            assert self._refs[page] > 0, f"page {page} freed twice"
            self._refs[page] -= 1
            if self._refs[page]:
                continue
            if self._hash_of[page] is None:
                self._blank.append(page)
            else:
                self._idle[page] = None

    def hashes(self, token_ids: Sequence[int], salt: str, known: Sequence[bytes] = ()) -> list[bytes]:
        """Hash of every full page of a sequence: sha256 over parent hash, token ids and, at the root, the salt.

        `known` are the hashes of its first pages, computed before.
        """
        digests = list(known)
        parent = digests[-1] if digests else hashlib.sha256(self._root + salt.encode()).digest()
        for start in range(len(digests) * self.page_size, len(token_ids) - self.page_size + 1, self.page_size):
            content = array("q", token_ids[start : start + self.page_size]).tobytes()
            parent = hashlib.sha256(parent + content).digest()
            digests.append(parent)
        return digests

    def first_visible(self, position: int) -> int:
        """Index of the first page that a query at `position` or later sees anything of."""
        return 0 if self.window is None else max(0, position - self.window + 1) // self.page_size

    def match(
        self, digests: Sequence[bytes], num_tokens: int, is_below: Callable[[bytes], bool] = lambda _: False
    ) -> list[int | None]:
        """Take a reference on the pages of the longest cached prefix, leaving at least one of `num_tokens` to compute.

        Args:
            is_below: whether a lower tier has the page with a hash that is not here.

        Returns:
            The prefix's pages, the caller's until it frees them: None where a lower tier has the page, 0 where
            nothing after the prefix can see it.
        """
        if not self.enable_prefix_caching:
            return []
        known = list(digests[: (num_tokens - 1) // self.page_size])
        length = self._longest_prefix(known, is_below)
        seen = self.first_visible(length * self.page_size)
        pages = [0] * seen + [self._page_of.get(digest) for digest in known[seen:length]]
        for page in pages:
            if page:
                self._idle.pop(page, None)
                self._refs[page] += 1
        return pages

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """Length of the longest run of cached pages that `match` would find; takes no reference."""
        return next((i for i, digest in enumerate(digests) if digest not in self._page_of), len(digests))

    def _longest_prefix(self, digests: Sequence[bytes], is_below: Callable[[bytes], bool]) -> int:
        """Pages of the longest prefix of which every page is cached that what follows it can see."""
        longest = run = 0
        for i, digest in enumerate(digests):
            run = run + 1 if digest in self._page_of or is_below(digest) else 0
            if run >= i + 1 - self.first_visible((i + 1) * self.page_size):
                longest = i + 1
            elif self.window is None:
                break
        return longest

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        """Record one admitted prompt in the hit-rate statistics."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit

    def publish(self, page: int, digest: bytes, parent: bytes | None = None, token_ids: Sequence[int] = ()) -> None:
        """Make a full page findable. The first page with a content wins; a later twin stays private.

        The page before it in the sequence and its tokens are for whoever listens.
        """
        if not page or not self.enable_prefix_caching or self._hash_of[page] is not None or digest in self._page_of:
            return
        self._hash_of[page] = digest
        self._page_of[digest] = page
        if self.events is not None:
            self.events.stored(digest, parent, token_ids)

    def unpublish(self, pages: Sequence[int]) -> None:
        """Let nobody find these pages any more: what they hold is wrong."""
        for page in pages:
            if (digest := self._hash_of[page]) is not None:
                self._hash_of[page] = None
                del self._page_of[digest]
                if self.events is not None:
                    self.events.removed(digest)
                if page in self._idle:
                    del self._idle[page]
                    self._blank.append(page)

    def evict_idle(self) -> None:
        """Give up every cached page that nobody references."""
        while self._idle:
            page, _ = self._idle.popitem(last=False)
            self._evict(page)
            self._blank.append(page)

    def reset_prefix_cache(self) -> None:
        """Forget all content; references stay."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._hash_of = [None] * self.num_pages
        self._tell_cleared()

    def _tell_cleared(self) -> None:
        if self.events is not None:
            self.events.cleared()

    def reset(self) -> None:
        """Forget all content and all owners (after a failed iteration, say)."""
        self._refs = [0] * self.num_pages
        self._hash_of = [None] * self.num_pages
        self._page_of.clear()
        self._idle.clear()
        self._blank = list(range(self.num_pages - 1, 0, -1))
        self._tell_cleared()

    def check(self, holders: Sequence[Sequence[int]]) -> None:
        """Assert that the books balance, given the page lists of everyone who holds references."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += page > 0
        assert counts == self._refs, "reference counts differ from what holders hold"
        free = [*self._blank, *self._idle]
        assert len(free) == len(set(free)), "a page is free twice"
        assert sorted(free) == [p for p in range(1, self.num_pages) if not counts[p]], "a page leaked"
        assert {d: p for p, d in enumerate(self._hash_of) if d is not None} == self._page_of
        assert set(self._idle) == {p for p in free if self._hash_of[p] is not None}
