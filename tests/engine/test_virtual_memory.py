"""Windows, copy-on-write, tiers and swapping through the real scheduler and page pool, on the fake device."""

from __future__ import annotations

import random

import pytest

from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.tiers import swap_is_cheaper
from tests.helpers.fake_device import naive_generate
from tests.helpers.scheduler_loop import Harness, make, request


def siblings(h: Harness, prompt: list[int], n: int, max_tokens: int = 8) -> list[Request]:
    """`n` requests of one prompt, as `n > 1` makes them."""
    first = request("0", list(prompt), max_tokens)
    rest = [request(str(i), list(prompt), max_tokens) for i in range(1, n)]
    for r in [first, *rest]:
        r.parent = first if r is not first else None
        h.scheduler.add(r)
    return [first, *rest]


def test_pages_out_of_every_window_are_freed_while_the_request_runs() -> None:
    h = make(num_pages=64, page_size=4, window=8, depth=1, caching=False)
    r = request("a", list(range(10)), max_tokens=100)
    h.scheduler.add(r)
    most = 0
    while not r.finished:
        h.step()
        most = max(most, sum(page > 0 for page in r.pages))
    assert r.token_ids == naive_generate(list(range(10)), 110, frozenset())
    assert most == 3, "8 keys lie in at most 3 pages of 4"


def test_without_a_window_on_every_layer_nothing_is_freed_early() -> None:
    h = make(num_pages=64, page_size=4, depth=1)
    r = request("a", list(range(10)), max_tokens=100)
    h.scheduler.add(r)
    while not r.finished:
        h.step()
        assert all(r.pages)


def test_a_prefix_is_found_by_the_pages_in_its_window_alone() -> None:
    pool = PagePool(64, 4, window=6)
    digests = pool.hashes(list(range(40)), "")
    pages = pool.allocate(10) or []
    for page, digest in zip(pages[5:8], digests[5:8], strict=True):
        pool.publish(page, digest)
    assert pool.match(digests, 41) == [0] * 6 + pages[6:8], "after 32 tokens the next query sees 5 keys before it"
    assert pool.match(digests[:5], 41) == []
    assert PagePool(64, 4).match(digests, 41) == []


def test_siblings_share_the_whole_prompt_and_each_copies_only_the_page_it_writes() -> None:
    h = make(num_pages=64, page_size=4, seqs=8, budget=64, caching=False)
    prompt = list(range(14))
    requests = siblings(h, prompt, 4)
    most = 0
    while any(not r.finished for r in requests):
        h.step()
        most = max(most, h.scheduler.pool.num_usable - h.scheduler.pool.num_free)
    assert h.device.num_computed - 4 * 7 == 14 + 3, "beside its own tokens each sibling computes one of the prompt"
    assert h.scheduler.num_copies == 3
    assert most <= 3 + 4 * 3, "three full pages once, then 2 tokens of prompt and 7 of its own for each"
    for r in requests:
        assert r.token_ids == naive_generate(prompt, 22, frozenset())


def test_a_prompt_that_ends_with_a_page_copies_nothing_but_that_page() -> None:
    h = make(num_pages=64, page_size=4, seqs=8, budget=64, caching=False)
    requests = siblings(h, list(range(13)), 3)
    h.run()
    assert h.scheduler.num_copies == 0, "the shared token is the first of its page: nothing before it to copy"
    assert all(r.token_ids == requests[0].token_ids for r in requests)


def test_siblings_wait_for_the_prompt_without_holding_up_others() -> None:
    h = make(num_pages=200, seqs=8, budget=8, depth=1)
    first, *rest = siblings(h, list(range(60)), 3)
    h.step()
    other = request("other", [1, 2, 3], max_tokens=2)
    h.scheduler.add(other)
    while not other.finished:
        h.step()
        assert not first.output_ids, "another request waited until the siblings' prompt was done"
        assert not any(r.pages for r in rest), "a sibling did not wait for the prompt"
    h.run()
    assert all(r.token_ids == first.token_ids for r in rest)


def filler(h: Harness, name: str, size: int) -> None:
    """Push everything idle out of the device."""
    h.scheduler.add(request(name, [1000 + ord(name[0])] * size, max_tokens=1))
    h.run()


@pytest.mark.parametrize("disk", [False, True])
def test_an_evicted_prefix_comes_back_from_the_tier_below(disk: bool) -> None:
    h = make(num_pages=13, page_size=4, host=4 if disk else 32, disk=disk)
    prompt = list(range(33))
    h.scheduler.add(request("a", list(prompt), max_tokens=1))
    h.run()
    filler(h, "x", 47)
    assert h.scheduler.pool.num_evictions >= 8
    computed = h.device.num_computed
    again = request("b", list(prompt), max_tokens=4)
    h.scheduler.add(again)
    h.run()
    assert again.num_cached == 32
    assert h.device.num_computed == computed + 1 + 3
    assert again.token_ids == naive_generate(prompt, 37, frozenset())
    if disk:
        assert h.disk, "a host pool of 4 pages cannot have kept 8"


def test_others_run_while_a_request_waits_for_its_pages() -> None:
    h = make(num_pages=13, page_size=4, host=32, depth=1)
    prompt = list(range(33))
    h.scheduler.add(request("a", list(prompt), max_tokens=1))
    h.run()
    filler(h, "x", 47)
    h.finish_loads = lambda: None  # type: ignore[method-assign]  # a load that never arrives
    waiting, other = request("b", list(prompt), max_tokens=4), request("c", [7, 8, 9], max_tokens=8)
    h.scheduler.add(waiting)
    h.scheduler.add(other)
    for _ in range(20):
        h.step()
    assert other.finished
    assert not waiting.output_ids
    h.scheduler.finish(waiting, "abort")
    h.run()
    assert h.scheduler.pool.num_free == h.scheduler.pool.num_usable


def test_requests_that_need_the_same_pages_load_them_once() -> None:
    h = make(num_pages=20, page_size=4, host=64, seqs=4)
    prompt = list(range(33))
    h.scheduler.add(request("a", list(prompt), max_tokens=1))
    h.run()
    filler(h, "x", 75)
    requests = [request(f"r{i}", [*prompt, i], max_tokens=2) for i in range(3)]
    loads = 0
    for r in requests:
        h.scheduler.add(r)
    while h.scheduler.has_work:
        before = list(h.loads)
        h.step()
        loads += sum(load not in before for load in h.loads)
    assert loads == 1
    assert [r.num_cached for r in requests] == [32, 32, 32]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preempted_requests_give_the_same_tokens_swapped_or_recomputed(mode: str) -> None:
    h = make(num_pages=8, seqs=3, caching=False, host=32, preemption=mode)
    requests = [request(name, [i, i + 1, i + 2], max_tokens=16) for i, name in enumerate("abc")]
    for r in requests:
        h.scheduler.add(r)
    h.run()
    assert sum(r.num_preemptions for r in requests) > 0
    assert (h.scheduler.tiers.stats.swaps_out > 0) == (mode == "swap")
    lost = h.device.num_computed - sum(len(r.token_ids) - 1 for r in requests)
    assert (lost == 0) == (mode == "swap"), "what was swapped is not computed again"
    for i, r in enumerate(requests):
        assert r.token_ids == naive_generate([i, i + 1, i + 2], 19, frozenset())
    assert len(h.scheduler.tiers.host) == 0, "a swapped cache outlived its request"


def test_the_cost_model_weighs_two_copies_against_the_prefill() -> None:
    assert swap_is_cheaper(1e6, 100, copy_bytes_per_s=1e9, prefill_tokens_per_s=1000)
    assert not swap_is_cheaper(1e6, 100, copy_bytes_per_s=1e7, prefill_tokens_per_s=1000)
    assert not swap_is_cheaper(1e6, 100, copy_bytes_per_s=0.0, prefill_tokens_per_s=1000), "nothing measured yet"
    assert not swap_is_cheaper(1e6, 100, copy_bytes_per_s=1e9, prefill_tokens_per_s=0.0)


@pytest.mark.parametrize("seed", range(200))
def test_any_mix_of_features_under_preemption_and_abort_gives_the_naive_tokens(seed: int) -> None:
    rng = random.Random(seed)
    budget, seqs = rng.choice([4, 8, 16, 64]), rng.choice([1, 2, 4, 6])
    h = make(
        num_pages=rng.choice([9, 12, 20, 60]),
        page_size=rng.choice([2, 4, 8]),
        seqs=seqs,
        budget=max(budget, seqs),
        steps=rng.choice([1, 2, 8]),
        depth=rng.choice([1, 2, 3]),
        caching=rng.random() < 0.7,
        window=rng.choice([None, None, 3, 5, 16]),
        host=rng.choice([0, 3, 10, 100]),
        disk=rng.random() < 0.5,
        preemption=rng.choice(["swap", "recompute"]),
        lossy=rng.random() < 0.3,
        seed=seed,
        drafts=rng.choice([0, 3]),
    )
    shared = [rng.randrange(5) for _ in range(30)]
    pending, requests, aborted = 14, [], set()
    while pending or h.scheduler.has_work or h.in_flight:
        if pending and rng.random() < 0.4:
            pending -= 1
            prompt = shared[: rng.randrange(30)] + [rng.randrange(5) for _ in range(rng.randrange(1, 12))]
            parent = None
            for i in range(rng.choice([1, 1, 1, 3])):
                stops = rng.sample(range(100), 10)
                r = request(f"{pending}.{i}", list(prompt), rng.randrange(1, 12), stops, rng.choice([0, 0, 0, -1, 1]))
                r.parent, r.priority = parent, parent.priority if parent else r.priority
                try:
                    h.scheduler.add(r)
                except ValueError:
                    break
                parent = parent or r
                requests.append((r, prompt))
        if requests and rng.random() < 0.05:
            r, _ = rng.choice(requests)
            if not r.finished:
                h.scheduler.finish(r, "abort")
                aborted.add(id(r))
        h.step()
    h.check_answers(requests, aborted)
    assert h.scheduler.tiers is None or h.scheduler.tiers.host.num_pinned == 0
