"""The page pool: which page of the KV cache belongs to whom. Plain Python: page numbers, no arrays.

Pages have reference counts. A full page whose content is known has a hash, chained over its prefix (vLLM's
prefix caching); a hashed page that nobody references stays findable until it is the least recently used one and
somebody needs the room. Page 0 is never handed out: padding writes there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Allocation, sharing and reuse of `num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_caching: bool = True, namespace: str = ""):
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages}; at least 2 are needed: page 0 is reserved for padding")
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
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
            self._forget(page)
            self.num_evictions += 1
        assert self._refs[page] == 0, f"page {page} handed out while referenced"
        self._refs[page] = 1
        return page

    def _forget(self, page: int) -> None:
        digest = self._hash_of[page]
        assert digest is not None, f"idle page {page} has no hash"
        self._hash_of[page] = None
        del self._page_of[digest]

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference of each. The last pages of a sequence become the first to be evicted."""
        for page in reversed(pages):
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

    def match(self, digests: Sequence[bytes], num_tokens: int) -> list[int]:
        """Take a reference on the longest run of cached pages, leaving at least one of `num_tokens` to compute.

        The pages are the caller's until it frees them.
        """
        if not self.enable_prefix_caching:
            return []
        pages = []
        for digest in digests[: (num_tokens - 1) // self.page_size]:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            self._idle.pop(page, None)
            self._refs[page] += 1
        return pages

    def num_cached(self, digests: Sequence[bytes]) -> int:
        """Length of the longest run of cached pages that `match` would find; takes no reference."""
        return next((i for i, digest in enumerate(digests) if digest not in self._page_of), len(digests))

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        """Record one admitted prompt in the hit-rate statistics."""
        self.num_queried_tokens += num_tokens
        self.num_hit_tokens += num_hit

    def publish(self, page: int, digest: bytes) -> None:
        """Make a full page findable. The first page with a content wins; a later twin stays private."""
        if self.enable_prefix_caching and self._hash_of[page] is None and digest not in self._page_of:
            self._hash_of[page] = digest
            self._page_of[digest] = page

    def reset_prefix_cache(self) -> None:
        """Forget all content (after a failed iteration, say); references stay."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._hash_of = [None] * self.num_pages

    def check(self, holders: Sequence[Sequence[int]]) -> None:
        """Assert that the books balance, given the page lists of everyone who holds references."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._refs, "reference counts differ from what holders hold"
        free = [*self._blank, *self._idle]
        assert len(free) == len(set(free)), "a page is free twice"
        assert sorted(free) == [p for p in range(1, self.num_pages) if not counts[p]], "a page leaked"
        assert {d: p for p, d in enumerate(self._hash_of) if d is not None} == self._page_of
        assert set(self._idle) == {p for p in free if self._hash_of[p] is not None}
