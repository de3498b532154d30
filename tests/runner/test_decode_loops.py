"""How many iterations one dispatch runs: the rules of `Scheduler.loop_steps`, one by one, on the fake device."""

from __future__ import annotations

from jaxllm.scheduling.plan import IterationPlan
from tests.helpers.scheduler_loop import Harness, make, request


def names(plan: IterationPlan) -> set[str]:
    return {chunk.request.request_id for chunk in plan.chunks}


def decode_steps(h: Harness, name: str) -> list[int]:
    """Steps of each plan that decodes and in which this request takes part."""
    return [plan.num_steps for plan in h.plans if plan.is_decode_loop and name in names(plan)]


def iterations_before(h: Harness, name: str) -> int:
    """Iterations of the device before this request first took part."""
    first = next(i for i, plan in enumerate(h.plans) if name in names(plan))
    return sum(plan.num_steps for plan in h.plans[:first])


def test_a_loop_is_as_long_as_allowed_and_as_its_longest_request() -> None:
    h = make(steps=8)
    h.scheduler.add(request("short", [1, 2], max_tokens=4))
    h.scheduler.add(request("long", [3, 4], max_tokens=22))
    h.run()
    assert decode_steps(h, "long") == [8, 8, 5], "the first of 22 tokens comes from the prefill"


def test_whoever_could_be_admitted_waits_for_no_loop() -> None:
    h = make(steps=8, seqs=2, num_pages=8, page_size=4)
    h.scheduler.add(request("runs", [1, 2], max_tokens=20))
    h.scheduler.add(request("waits", list(range(10, 34)), max_tokens=4))  # there is a slot, but too few pages
    h.run()
    assert set(decode_steps(h, "runs")) == {1}
    assert decode_steps(h, "waits") == [3]


def test_loops_run_while_others_wait_for_a_slot_and_none_falls_free_in_mid_loop() -> None:
    harnesses = {steps: make(steps=steps, seqs=2) for steps in (1, 8)}
    for h in harnesses.values():
        for name, max_tokens in (("a", 30), ("b", 13), ("c", 5), ("d", 9)):
            h.scheduler.add(request(name, [ord(name)], max_tokens=max_tokens))
        h.run()
    single, loops = harnesses[1], harnesses[8]
    assert decode_steps(loops, "b") == [8, 4]
    for name in "cd":
        assert iterations_before(loops, name) == iterations_before(single, name)


def test_no_loop_runs_while_others_wait_for_requests_that_may_stop_at_any_token() -> None:
    h = make(steps=8, seqs=2)
    never = [100]  # the fake model's tokens end at 99
    for name in "abc":
        h.scheduler.add(request(name, [ord(name)], max_tokens=20, stop=never))
    h.run()
    assert set(decode_steps(h, "a") + decode_steps(h, "b")) == {1}
    assert max(decode_steps(h, "c")) == 8


def test_tokens_come_one_by_one_while_anything_that_runs_is_streamed() -> None:
    h = make(steps=8)
    streamed, other = request("streamed", [1, 2], max_tokens=6), request("other", [3, 4], max_tokens=30)
    streamed.streamed = True
    for r in (streamed, other):
        h.scheduler.add(r)
    h.run()
    assert decode_steps(h, "streamed") == [1] * 5
    assert decode_steps(h, "other") == [1] * 5 + [8, 8, 8]
