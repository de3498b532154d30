"""Which adapter lies in which slot: shared, evicted when nobody holds it, waited for in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.adapter_slots import AdapterSlots
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler


@dataclass(frozen=True)
class Named:
    identity: str
    arrays: Any = None


A, B, C = Named("a"), Named("b"), Named("c")


def test_requests_share_a_slot_and_the_least_recently_used_idle_one_makes_way():
    slots = AdapterSlots(2)
    assert slots.hold(None) == 0
    first, second = slots.hold(A), slots.hold(B)
    assert {first, second} == {1, 2} and slots.hold(A) == first
    assert slots.take_loads() == [(first, A), (second, B)] and slots.take_loads() == []
    slots.release(B)
    slots.release(A)
    assert slots.has_room(C) and slots.hold(C) == second  # A is still held once
    assert slots.take_loads() == [(second, C)]
    assert slots.has_room(None) and not slots.has_room(B)


def test_an_adapter_that_comes_back_before_its_slot_was_needed_is_not_loaded_again():
    slots = AdapterSlots(1)
    slots.hold(A)
    slots.release(A)
    slots.take_loads()
    assert slots.hold(A) == 1 and slots.take_loads() == []


def request(name: str, adapter: Named | None, length: int = 8) -> Request:
    return Request(name, [1, 2, 3], SamplingParams(), limit=length, adapter=adapter)


def run(scheduler: Scheduler, steps: int) -> list[list[str]]:
    """Names that take part in each iteration; every one samples a token."""
    taken = []
    for _ in range(steps):
        plan = scheduler.schedule()
        taken.append([] if plan is None else [chunk.request.request_id for chunk in plan.chunks])
        for chunk in [] if plan is None else plan.chunks:
            scheduler.append_tokens(chunk.request, [5] * chunk.num_samples, chunk.num_samples)
            if chunk.request.exhausted:
                scheduler.finish(chunk.request, "length")
    return taken


def scheduler_of(num_slots: int) -> Scheduler:
    pool = PagePool(64, 4)
    return Scheduler(pool, max_num_seqs=4, max_num_batched_tokens=32, adapter_slots=AdapterSlots(num_slots))


def test_who_waits_for_a_slot_holds_up_nobody_else_and_is_not_passed_for_ever():
    scheduler = scheduler_of(1)
    for one in (request("a1", A), request("b1", B), request("a2", A), request("base", None)):
        scheduler.add(one)
    first = run(scheduler, 1)[0]
    assert set(first) == {"a1", "base"}  # a2 came after b1, which waits for a's slot
    names = run(scheduler, 20)
    order = [name for step in names for name in step]
    assert order.index("b1") < order.index("a2") and not scheduler.has_work
    scheduler.pool.check([])


def test_pages_of_one_adapter_are_found_by_no_other():
    pool = PagePool(64, 4)
    salts = {one.page_salt for one in (request("x", None), request("y", A), request("z", B))}
    roots = {pool.hashes([1, 2, 3, 4], salt)[0] for salt in salts}
    assert len(salts) == len(roots) == 3


def test_a_restart_forgets_what_the_slots_held():
    scheduler = scheduler_of(2)
    one = request("a1", A)
    scheduler.add(one)
    run(scheduler, 1)
    scheduler.restart([one])
    plan = scheduler.schedule()
    assert plan is not None and [adapter for _, adapter in plan.loads] == [A] and one.held.adapter_slot == 2 - 1
