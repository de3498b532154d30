"""The page pool against a brute-force model of reference counts and least-recently-used reuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from jaxllm.scheduling.page_pool import PagePool

PAGE = 4


def test_page_zero_is_never_handed_out() -> None:
    pool = PagePool(5, PAGE)
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert pool.allocate(1) is None


def test_a_refused_allocation_changes_nothing() -> None:
    pool = PagePool(4, PAGE)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_freeing_twice_is_caught() -> None:
    pool = PagePool(4, PAGE)
    pages = pool.allocate(1) or []
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)


def test_equal_prefixes_have_equal_hashes_and_different_ones_do_not() -> None:
    pool = PagePool(4, PAGE)
    base = pool.hashes(list(range(12)), "")
    assert len(base) == 3
    assert pool.hashes(list(range(15)), "") == base
    assert pool.hashes([0, 1, 2, 3, 9, 5, 6, 7], "")[0] == base[0]
    assert pool.hashes([0, 1, 2, 3, 9, 5, 6, 7], "")[1] != base[1]
    assert pool.hashes([9, 1, 2, 3, 4, 5, 6, 7], "")[1] != base[1], "a page's hash must cover its whole prefix"
    assert pool.hashes(list(range(12)), "tenant")[0] != base[0]
    assert PagePool(4, PAGE, namespace="other model").hashes(list(range(12)), "")[0] != base[0]


def test_hashes_continue_from_known_ones() -> None:
    pool = PagePool(4, PAGE)
    tokens = list(range(16))
    assert pool.hashes(tokens, "s", pool.hashes(tokens[:8], "s")) == pool.hashes(tokens, "s")


def test_a_match_always_leaves_a_token_to_compute() -> None:
    pool = PagePool(4, PAGE)
    tokens = list(range(8))
    pages = pool.allocate(2) or []
    digests = pool.hashes(tokens, "")
    for page, digest in zip(pages, digests, strict=True):
        pool.publish(page, digest)
    assert pool.match(digests, 8) == pages[:1]
    assert pool.match(digests, 9) == pages


def test_pages_without_content_go_before_cached_ones_and_the_oldest_cached_first() -> None:
    pool = PagePool(5, PAGE)
    a, b, c, d = pool.allocate(4) or []
    for page, name in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.publish(page, name)
    pool.free([b])
    pool.free([a])
    pool.free([c])
    pool.free([d])
    assert pool.allocate(2) == [d, b]
    assert pool.num_evictions == 1
    assert pool.match([b"b"], 100) == []
    assert pool.match([b"a"], 100) == [a]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = PagePool(4, PAGE)
    pages = pool.allocate(3) or []
    for i, page in enumerate(pages):
        pool.publish(page, bytes([i]))
    pool.free(pages)
    assert pool.allocate(1) == [pages[2]]


def test_switched_off_nothing_is_ever_found() -> None:
    pool = PagePool(4, PAGE, enable_prefix_caching=False)
    (page,) = pool.allocate(1) or []
    pool.publish(page, b"x")
    assert pool.match([b"x"], 100) == []


class PoolMachine(RuleBasedStateMachine):
    """Holders take and drop pages in any order; a model keeps contents and recency by brute force."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9, PAGE)
        self.held: dict[int, list[int]] = {}
        self.content: dict[int, bytes] = {}
        self.idle_since: dict[int, int] = {}
        self.clock = 0
        self.next_holder = 0

    def _hold(self, pages: list[int]) -> int:
        self.next_holder += 1
        self.held[self.next_holder] = pages
        return self.next_holder

    def _refs(self, page: int) -> int:
        return sum(pages.count(page) for pages in self.held.values())

    @rule(target=holders, count=st.integers(0, 5))
    def allocate(self, count: int) -> int:
        free = [p for p in range(1, 9) if not self._refs(p)]
        blank = [p for p in free if p not in self.content]
        pages = self.pool.allocate(count)
        assert (pages is None) == (count > len(free))
        for page in pages or []:
            assert page in free
        evicted = [p for p in pages or [] if p in self.content]
        assert len(evicted) == max(0, count - len(blank)) if pages is not None else not evicted
        oldest = sorted((p for p in free if p in self.content), key=lambda p: self.idle_since[p])
        assert evicted == oldest[: len(evicted)], "not the least recently used"
        for page in evicted:
            del self.content[page]
        return self._hold(pages or [])

    @rule(holder=consumes(holders))
    def free(self, holder: int) -> None:
        pages = self.held.pop(holder)
        self.pool.free(pages)
        for page in reversed(pages):
            self.clock += 1
            if not self._refs(page):
                self.idle_since[page] = self.clock

    @rule(holder=holders, name=st.sampled_from([b"1", b"2", b"3", b"4"]))
    def publish(self, holder: int, name: bytes) -> None:
        for page in self.held.get(holder, [])[:1]:
            self.pool.publish(page, name)
            if page not in self.content and name not in self.content.values():
                self.content[page] = name

    @rule(target=holders, names=st.lists(st.sampled_from([b"1", b"2", b"3", b"4"]), max_size=4))
    def match(self, names: list[bytes]) -> int:
        by_name = {name: page for page, name in self.content.items()}
        expected = []
        for name in names:
            if name not in by_name:
                break
            expected.append(by_name[name])
        pages = self.pool.match(names, 10**6)
        assert pages == expected
        return self._hold(pages)

    @precondition(lambda self: not self.held)
    @rule()
    def everything_is_free_when_nobody_holds(self) -> None:
        assert self.pool.num_free == 8

    @invariant()
    def books_balance(self) -> None:
        self.pool.check(list(self.held.values()))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.integers(0, 10**6), st.integers(1, 64))
def test_pages_for_is_rounded_up(tokens: int, size: int) -> None:
    pages = PagePool(2, size).pages_for(tokens)
    assert (pages - 1) * size < tokens <= pages * size or tokens == pages == 0
