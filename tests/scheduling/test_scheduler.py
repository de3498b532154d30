"""The scheduler on a fake device that checks every read, under random arrivals, aborts and tiny pools."""

from __future__ import annotations

import random

import pytest

from tests.helpers.fake_device import naive_generate
from tests.helpers.scheduler_loop import make, request


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks_of_the_budget() -> None:
    h = make(budget=16)
    h.scheduler.add(request("a", list(range(40)), max_tokens=1))
    h.run()
    assert [plan.num_tokens for plan in h.plans] == [16, 16, 8]
    assert [plan.chunks[0].num_samples for plan in h.plans] == [0, 0, 1]


def test_decodes_are_carried_and_prefills_get_what_they_leave() -> None:
    h = make(budget=16, depth=1)
    for name in "ab":
        h.scheduler.add(request(name, [1, 2, 3], max_tokens=30))
    h.step()
    h.scheduler.add(request("long", list(range(60)), max_tokens=2))
    plans = [h.step() for _ in range(4)]
    for plan in plans:
        assert plan is not None
        assert [c.count for c in plan.chunks[:2]] == [1, 1], "both decodes take part in every iteration"
        assert plan.num_tokens == 16
        assert [c.request.request_id for c in plan.chunks] == ["a", "b", "long"]


def test_short_prompts_pass_the_long_ones_that_wait_and_take_at_most_half_of_an_iteration() -> None:
    h = make(num_pages=400, budget=16, seqs=8, depth=1)
    for i in range(3):
        h.scheduler.add(request(f"long{i}", list(range(100 * i, 100 * i + 64)), max_tokens=1))
    h.step()
    for name in ("s0", "s1", "s2"):
        h.scheduler.add(request(name, [ord(c) for c in name] * 2, max_tokens=1))
    plans = [h.step() for _ in range(2)]
    counts = [{c.request.request_id: c.count for c in plan.chunks} for plan in plans if plan]
    assert counts == [{"s0": 4, "s1": 4, "long0": 8}, {"s2": 4, "long0": 12}]


def test_short_prompts_without_end_do_not_starve_a_long_one() -> None:
    h = make(num_pages=400, budget=16, seqs=2, depth=1)
    long = [request(f"long{i}", list(range(100 * i, 100 * i + 64)), max_tokens=1) for i in range(2)]
    for r in long:
        h.scheduler.add(r)
    for i in range(40):
        h.scheduler.add(request(f"s{i}", [i] * 8, max_tokens=3))
        h.step()
    assert all(r.finished for r in long)


def test_a_short_newcomer_samples_in_the_iteration_that_admits_it() -> None:
    h = make(depth=1)
    h.scheduler.add(request("old", [1, 2, 3], max_tokens=50))
    for _ in range(3):
        h.step()
    h.scheduler.add(request("new", [4, 5], max_tokens=5))
    plan = h.step()
    assert plan is not None
    assert {c.request.request_id: c.num_samples for c in plan.chunks} == {"old": 1, "new": 1}


def test_a_finished_request_makes_room_in_the_next_iteration() -> None:
    h = make(seqs=1, depth=1)
    h.scheduler.add(request("first", [1], max_tokens=1))
    h.scheduler.add(request("second", [2], max_tokens=1))
    h.step()
    plan = h.step()
    assert plan is not None
    assert [r.request_id for r in plan.admitted] == ["second"]


def test_a_better_priority_goes_first_and_is_preempted_last() -> None:
    h = make(seqs=1)
    h.scheduler.add(request("normal", [1, 2], priority=0))
    h.scheduler.add(request("urgent", [3, 4], priority=-1))
    plan = h.step()
    assert plan is not None
    assert plan.chunks[0].request.request_id == "urgent"


def test_when_out_of_pages_the_newest_is_preempted_and_still_gives_the_same_tokens() -> None:
    h = make(num_pages=8, seqs=3, caching=False)
    requests = [request(name, [i, i + 1, i + 2], max_tokens=16) for i, name in enumerate("abc")]
    for r in requests:
        h.scheduler.add(r)
    h.run()
    assert requests[0].num_preemptions == 0, "the oldest was preempted"
    assert requests[2].num_preemptions > 0
    for i, r in enumerate(requests):
        assert r.token_ids == naive_generate([i, i + 1, i + 2], 19, frozenset())


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    h = make(num_pages=4)
    with pytest.raises(ValueError, match=r"grow to 28 tokens = 7 pages but the cache has 3"):
        h.scheduler.add(request("huge", list(range(20)), max_tokens=8))


def test_two_equal_prompts_that_arrive_together_are_computed_once() -> None:
    h = make(budget=64)
    prompt = list(range(41))
    for name in "ab":
        h.scheduler.add(request(name, list(prompt), max_tokens=1))
    h.run()
    assert h.device.num_computed == 41 + 1


def test_a_later_request_reuses_the_pages_of_a_finished_one() -> None:
    h = make()
    first = request("a", list(range(20)), max_tokens=4)
    h.scheduler.add(first)
    h.run()
    again = request("b", first.token_ids[:22], max_tokens=1)
    h.scheduler.add(again)
    h.run()
    assert again.num_cached == 20
    assert again.token_ids == naive_generate(first.token_ids[:22], 23, frozenset())


def test_different_salts_share_nothing() -> None:
    h = make()
    for name in "ab":
        r = request(name, list(range(20)), max_tokens=1)
        r.cache_salt = name
        h.scheduler.add(r)
        h.run()
        assert r.num_cached == 0


def test_abort_frees_everything_wherever_the_request_stands() -> None:
    h = make(seqs=1)
    running, waiting = request("a", list(range(10))), request("b", list(range(10)))
    for r in (running, waiting):
        h.scheduler.add(r)
    h.step()
    for r in (waiting, running):
        h.scheduler.finish(r, "abort")
    h.run()
    assert h.scheduler.pool.num_free == h.scheduler.pool.num_usable
    assert not h.scheduler.has_work


@pytest.mark.parametrize("seed", range(120))
def test_any_order_of_add_abort_preempt_and_finish_gives_the_naive_tokens(seed: int) -> None:
    rng = random.Random(seed)
    budget, seqs = rng.choice([4, 8, 16, 64]), rng.choice([1, 2, 4])
    h = make(
        num_pages=rng.choice([9, 12, 20, 60]),
        page_size=rng.choice([2, 4, 8]),
        seqs=seqs,
        budget=max(budget, seqs),
        steps=rng.choice([1, 2, 8]),
        depth=rng.choice([1, 2, 3]),
        caching=rng.random() < 0.7,
        drafts=rng.choice([0, 0, 1, 4]),
    )
    shared = [rng.randrange(5) for _ in range(20)]
    pending, requests, aborted = 12, [], set()
    while pending or h.scheduler.has_work or h.in_flight:
        if pending and rng.random() < 0.4:
            pending -= 1
            prompt = shared[: rng.randrange(12)] + [rng.randrange(5) for _ in range(rng.randrange(1, 12))]
            stops = rng.sample(range(100), rng.choice([0, 10]))
            r = request(str(pending), list(prompt), rng.randrange(1, 12), stops, rng.choice([0, 0, 0, -1, 1]))
            r.streamed = rng.random() < 0.2
            try:
                h.scheduler.add(r)
            except ValueError:
                continue
            requests.append((r, prompt))
        if requests and rng.random() < 0.05:
            r, _ = rng.choice(requests)
            if not r.finished:
                h.scheduler.finish(r, "abort")
                aborted.add(id(r))
        h.step()
    assert requests or h.scheduler.pool.num_pages == 9
    h.check_answers(requests, aborted)
