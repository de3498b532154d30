"""Several schedulers as one, on fake devices that check every read: routing, merged plans, no page shared."""

from __future__ import annotations

import random
from collections import deque

import pytest

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.replicas import Replicas
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from tests.helpers.fake_device import FakeDevice, naive_generate

SEQS, BUDGET = 4, 16


def make(num_replicas: int = 3, num_pages: int = 40, steps: int = 4, drafts: int = 0) -> Replicas:
    def part(replica: int) -> Scheduler:
        return Scheduler(
            PagePool(num_pages, 4),
            max_num_seqs=SEQS,
            max_num_batched_tokens=BUDGET,
            max_decode_steps=steps,
            first_slot=replica * SEQS,
            num_drafts=drafts,
        )

    return Replicas([part(z) for z in range(num_replicas)])


def request(name: str, prompt: list[int], max_tokens: int = 8, stop: tuple[int, ...] = ()) -> Request:
    return Request(
        request_id=name,
        token_ids=prompt,
        params=SamplingParams(),
        limit=len(prompt) + max_tokens,
        stop_ids=frozenset(stop),
    )


class Harness:
    """The engine's loop over one fake device per replica; two plans are dispatched before the oldest is read."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.devices = [FakeDevice(4) for _ in replicas.parts]
        self.in_flight: deque[list[tuple[Chunk, list[int]]]] = deque()
        self.plans: list[IterationPlan] = []

    def step(self) -> None:
        plan = self.replicas.schedule()
        self.check(plan)
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append([r for z in range(len(self.devices)) for r in self.run_part(plan, z)])
        if self.in_flight and (plan is None or len(self.in_flight) >= 2):
            for chunk, tokens in self.in_flight.popleft():
                self.hand_over(chunk, tokens)

    def run_part(self, plan: IterationPlan, z: int) -> list[tuple[Chunk, list[int]]]:
        chunks = [c for c in plan.chunks if c.request.replica == z]
        admitted = [r for r in plan.admitted if r.replica == z]
        return self.devices[z].run(IterationPlan(chunks, admitted, plan.is_decode_loop, plan.num_steps))

    def hand_over(self, chunk: Chunk, tokens: list[int]) -> None:
        r = chunk.request
        if r.finished:
            return
        self.replicas.append_tokens(r, tokens, chunk.num_samples, chunk.num_unsure)
        if r.token_ids[-1] in r.stop_ids:
            self.replicas.finish(r, "stop")
        elif len(r.token_ids) >= r.limit:
            self.replicas.finish(r, "length")

    def check(self, plan: IterationPlan | None) -> None:
        running = self.replicas.running
        self.replicas.pool.check(running)
        assert len({r.slot for r in running}) == len(running), "two requests in one slot"
        assert all(r.slot // SEQS == r.replica for r in running)
        for z in range(len(self.devices)):
            chunks = [c for c in plan.chunks if c.request.replica == z] if plan else []
            assert sum(c.count for c in chunks) <= BUDGET, "each replica has a token budget of its own"
            singles = [c.count > 1 for c in chunks]
            assert singles == sorted(singles), "single queries come first in each replica"
        if plan is not None and plan.is_decode_loop:
            assert all(c.count == 1 and c.num_samples <= plan.num_steps * (1 + c.num_drafts) for c in plan.chunks)

    def run(self) -> None:
        for _ in range(3000):
            if not (self.replicas.has_work or self.in_flight):
                return
            self.step()
        raise AssertionError("no progress")


@pytest.mark.parametrize("seed", range(12))
def test_every_request_gets_the_tokens_it_gets_alone_under_random_arrivals_and_aborts(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {"num_pages": rng.choice((14, 40)), "steps": rng.choice((1, 4)), "drafts": rng.choice((0, 3))}
    harness = Harness(make(rng.choice((2, 3, 8)), **sizes))
    heads = [[rng.randrange(100) for _ in range(12)] for _ in range(2)]
    kept: list[tuple[Request, list[int]]] = []
    for i in range(30):
        prompt = rng.choice(heads)[: rng.randrange(1, 13)] + [rng.randrange(100) for _ in range(rng.randrange(12))]
        r = request(f"r{i}", list(prompt), rng.randrange(1, 14), stop=(rng.randrange(100),))
        harness.replicas.add(r)
        kept.append((r, naive_generate(prompt, r.limit, r.stop_ids)))
        for _ in range(rng.randrange(3)):
            harness.step()
        if rng.random() < 0.2:
            victim = rng.choice(kept)[0]
            harness.replicas.finish(victim, "abort")
    harness.run()
    assert all(r.finish_reason == "abort" or r.token_ids == expected for r, expected in kept)
    assert sum(r.finish_reason != "abort" for r, _ in kept) > 10
    harness.replicas.pool.check([])


def test_requests_spread_over_the_least_loaded_replicas() -> None:
    replicas = make(3)
    requests = [request(f"r{i}", [i, i + 1, i + 2]) for i in range(7)]
    for r in requests:
        replicas.add(r)
    assert [r.replica for r in requests] == [0, 1, 2, 0, 1, 2, 0]


def test_a_cached_prefix_draws_its_requests_unless_that_replica_is_overloaded() -> None:
    harness = Harness(make(3, num_pages=80))
    head = list(range(16))
    harness.replicas.add(request("other", [90]))
    harness.replicas.add(request("first", [*head, 50], max_tokens=2))
    harness.run()
    followers = [request(f"f{i}", [*head, 60 + i]) for i in range(4)]
    for r in followers:
        harness.replicas.add(r)
    assert [r.replica for r in followers] == [1, 0, 2, 1], "the slack is one request here"
    harness.run()
    assert followers[0].num_cached == 16 and followers[1].num_cached == 0


def test_one_replica_alone_has_work_and_the_others_stay_empty() -> None:
    harness = Harness(make(3))
    only = request("only", [1, 2, 3], max_tokens=9)
    harness.replicas.add(only)
    harness.run()
    assert only.token_ids == naive_generate([1, 2, 3], 12, frozenset())
    assert [plan.num_steps for plan in harness.plans if plan.is_decode_loop] == [4, 4]


def test_a_decode_loop_runs_only_where_every_busy_replica_can() -> None:
    harness = Harness(make(2))
    harness.replicas.add(request("a", [1, 2], max_tokens=20))
    harness.step()
    harness.replicas.add(request("long", list(range(40)), max_tokens=1))
    for _ in range(3):
        harness.step()
    assert [plan.is_decode_loop for plan in harness.plans[1:4]] == [False] * 3
    assert [[c.count for c in plan.chunks] for plan in harness.plans[1:4]] == [[1, 16], [1, 16], [1, 8]]


def test_pool_figures_are_sums_and_a_leak_in_one_replica_is_seen() -> None:
    replicas = make(3, num_pages=10)
    assert (replicas.pool.num_usable, replicas.pool.num_free) == (27, 27)
    taken = replicas.parts[1].pool.allocate(2)
    assert taken and replicas.pool.num_free == 25
    with pytest.raises(AssertionError):
        replicas.pool.check([])
