"""The host tier's books: bounds, order of eviction, pins and promises."""

from __future__ import annotations

from jaxllm.scheduling.host_pool import HostPool


def test_the_least_recently_used_goes_first_and_to_the_next_tier() -> None:
    evicted: list[tuple[bytes, str]] = []
    pool = HostPool(2, lambda key, slab: evicted.append((key, slab)))
    for key in (b"a", b"b"):
        assert pool.reserve(key)
        pool.fill(key, key.decode())
    assert pool.get(b"a") == "a"
    pool.reserve(b"c")
    assert evicted == [(b"b", "b")]
    assert (b"a" in pool, b"b" in pool, b"c" in pool) == (True, False, True)
    assert pool.num_evictions == 1


def test_a_promised_slab_is_not_found_before_it_is_there() -> None:
    pool = HostPool(1)
    pool.reserve(b"a")
    assert not pool.has(b"a")
    pool.fill(b"a", "slab")
    assert pool.has(b"a")


def test_a_slab_whose_place_was_taken_before_it_came_goes_to_the_next_tier() -> None:
    evicted: list[bytes] = []
    pool = HostPool(1, lambda key, _: evicted.append(key))
    pool.reserve(b"a")
    pool.reserve(b"b")
    assert pool.expects(b"a")
    pool.fill(b"a", "slab")
    assert evicted == [b"a"]
    assert len(pool) == 1


def test_pinned_slabs_are_never_evicted() -> None:
    pool = HostPool(2)
    assert pool.reserve(b"a", pin=True)
    assert pool.reserve(b"b")
    assert pool.reserve(b"c", pin=True)
    assert b"b" not in pool
    assert not pool.reserve(b"d"), "everything is pinned"
    assert not pool.has_room(1)
    pool.drop(b"a")
    assert pool.reserve(b"d")
