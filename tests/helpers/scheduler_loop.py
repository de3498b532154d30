"""The engine's loop around a real scheduler and page pool, on the fake device: books are checked at every step.

Tiers are the real ones too; what moves between them is copied here, loads taking a random number of steps.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.host_pool import HostPool
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.tiers import Load, Tiers
from tests.helpers.fake_device import FakeDevice, naive_generate


@dataclass
class Harness:
    """Engine loop over a fake device: `depth` plans are dispatched before the oldest is read."""

    scheduler: Scheduler
    device: FakeDevice
    depth: int = 2
    in_flight: deque[list[tuple[Chunk, list[int]]]] = field(default_factory=deque)
    plans: list[IterationPlan] = field(default_factory=list)
    disk: dict[bytes, Any] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    lossy: bool = False  # some pages cannot be read back

    def step(self) -> IterationPlan | None:
        self.finish_loads()
        late = list(self.scheduler._unsent)
        plan = self.scheduler.schedule()
        self.check(plan, late)
        self.start_moves()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append(self.device.run(plan))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            self.collect(self.in_flight.popleft())
        return plan

    def collect(self, results: list[tuple[Chunk, list[int]]]) -> None:
        for chunk, tokens in results:
            request = chunk.request
            if request.finished:
                continue
            self.scheduler.append_tokens(request, tokens, chunk.num_samples, chunk.num_unsure)
            if request.token_ids[-1] in request.stop_ids:
                self.scheduler.finish(request, "stop")
            elif len(request.token_ids) >= request.limit:
                self.scheduler.finish(request, "length")

    def start_moves(self) -> None:
        if (tiers := self.scheduler.tiers) is None:
            return
        for page, key in tiers.take_evictions():
            tiers.host.fill(key, self.device.read_page(page))
        self.loads += tiers.take_loads()
        assert len(tiers.host) <= tiers.host.capacity

    def finish_loads(self) -> None:
        for load in [load for load in self.loads if load.ended or self.rng.random() < 0.4]:
            self.loads.remove(load)
            if load.ended:
                continue
            pairs = zip(load.keys, load.sources, strict=True)
            found = [source or self.disk.get(key) for key, source in pairs]
            arrived = [content is not None and not (self.lossy and self.rng.random() < 0.2) for content in found]
            for key, page, content, is_here in zip(load.keys, load.pages, found, arrived, strict=True):
                if is_here:
                    self.device.write_page(page, content)
                else:
                    self.disk.pop(key, None)
                    self.scheduler.tiers.host.drop(key)
            self.scheduler.loaded(load, arrived)

    def check(self, plan: IterationPlan | None, late: list[Request]) -> None:
        s = self.scheduler
        s.pool.check([r.pages for r in s.running])
        assert len(s.running) <= s.max_num_seqs
        assert len({r.slot for r in s.running}) == len(s.running)
        if plan is None:
            return
        assert 0 < plan.num_tokens <= s.max_num_batched_tokens
        assert len({id(c.request) for c in plan.chunks}) == len(plan.chunks)
        counts = [c.count > 1 for c in plan.chunks]
        assert counts == sorted(counts), "single queries come first"
        written: list[int] = []
        for chunk in plan.chunks:
            end = chunk.start + max(chunk.count, chunk.num_samples)
            written += chunk.request.pages[chunk.start // s.pool.page_size : s.pool.pages_for(end)]
        assert len(written) == len(set(written)), "a page is written by two requests"
        short, long = ([r for _, r in queue if not r.finished] for queue in s._waiting)
        assert s.num_waiting == len(short) + len(long) + sum(not r.finished for r in s._blocked)
        for request in plan.admitted:
            if request in late:
                continue
            assert all(request.rank < other.rank for other in short), "a short prompt was overtaken"
            passed = [other for other in long if other.rank < request.rank]
            assert not passed or self.beside_long_prefill(plan, request, late), (
                "a long prompt was overtaken for nothing"
            )

    def beside_long_prefill(self, plan: IterationPlan, request: Request, late: list[Request]) -> bool:
        """Whether a request may have been admitted before longer prompts that came first.

        What is `late` runs already: it had its slot when its pages were sent for.
        """
        budget, new = self.scheduler.max_num_batched_tokens, [r for r in plan.admitted if r not in late]
        before = [(c.request, c.request.num_left + c.count) for c in plan.chunks if c.request not in new]
        return any(left > budget // 2 and r.priority >= request.priority for r, left in before)

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not (self.scheduler.has_work or self.in_flight):
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def check_answers(self, requests: list[tuple[Request, list[int]]], aborted: set[int]) -> None:
        """Each request got the naive tokens of its prompt (those whose id is in `aborted`: some); nothing leaked."""
        for r, prompt in requests:
            assert r.finished
            expected = naive_generate(prompt, r.limit, r.stop_ids)
            assert r.token_ids == (expected[: len(r.token_ids)] if id(r) in aborted else expected)
        self.scheduler.pool.check([])
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_usable


def make(
    num_pages=64,
    page_size=4,
    seqs=4,
    budget=16,
    steps=1,
    depth=2,
    caching=True,
    window=None,
    host=0,
    disk=False,
    preemption="recompute",
    lossy=False,
    seed=0,
    drafts=0,
) -> Harness:
    """A loop; `host` is the host tier's size in pages, without one there are no tiers."""
    pool = PagePool(num_pages, page_size, enable_prefix_caching=caching, window=window)
    store: dict[bytes, Any] = {}
    tiers = None
    if host:
        lower = HostPool(host, store.__setitem__ if disk else None)
        tiers = Tiers(lower, store if disk else None, page_bytes=1, preemption=preemption)
    scheduler = Scheduler(
        pool,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_decode_steps=steps,
        tiers=tiers,
        num_drafts=drafts,
    )
    return Harness(scheduler, FakeDevice(page_size, window), depth, disk=store, rng=random.Random(seed), lossy=lossy)


def request(name: str, prompt: list[int], max_tokens: int = 8, stop=(), priority: int = 0) -> Request:
    """A greedy request."""
    return Request(
        request_id=name,
        token_ids=prompt,
        params=SamplingParams(),
        limit=len(prompt) + max_tokens,
        stop_ids=frozenset(stop),
        priority=priority,
    )
