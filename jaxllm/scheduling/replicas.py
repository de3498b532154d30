"""Data-parallel replicas: one scheduler and page pool each, and the router in front of them.

Requests -> one merged `IterationPlan` per iteration, which all replicas run in one program. Both are
`Scheduling`. Plain Python: where a replica's tokens and pages lie is the business of the batch and the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from jaxllm.scheduling.adapter_slots import AdapterSlots
from jaxllm.scheduling.page_lists import utilization
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.tiers import Load


class Scheduling(Protocol):
    """What an engine asks of whoever schedules: one `Scheduler`, whose methods say more, or `Replicas` of it."""

    @property
    def pool(self) -> PagePool | ReplicaPools: ...
    @property
    def running(self) -> list[Request]: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_copies(self) -> int: ...
    @property
    def slot_utilization(self) -> float: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def adapter_slots(self) -> AdapterSlots: ...
    def check_fits(self, limit: int) -> None: ...
    def add(self, request: Request) -> None: ...
    def schedule(self, steps: int | None = None) -> IterationPlan | None: ...
    def fork(self, parent: Request, child: Request) -> None: ...
    def extend(self, request: Request, tokens: Sequence[int]) -> None: ...
    def truncate(self, request: Request, length: int) -> None: ...
    def detach(self, request: Request) -> list[int]: ...
    def restart(self, requests: Sequence[Request]) -> None: ...
    def loaded(self, load: Load, arrived: Sequence[bool]) -> None: ...
    def append_tokens(self, request: Request, tokens: Sequence[int], num_samples: int, num_unsure: int = 0) -> None: ...
    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, publish: bool = True
    ) -> None: ...


def side_by_side(parts: Sequence[Scheduler]) -> Scheduling:
    """These schedulers as one."""
    return parts[0] if len(parts) == 1 else Replicas(parts)


class Replicas:
    """Several schedulers side by side.

    A request goes to the replica with the longest cached prefix of it, unless that one has `slack` requests more
    than the least loaded (a quarter of those that run together); else to the least loaded. It stays there.
    """

    def __init__(self, parts: Sequence[Scheduler]):
        self.parts = list(parts)
        self.pool = ReplicaPools([part.pool for part in parts])
        self.slack = max(1, parts[0].max_num_seqs // 4)

    @property
    def running(self) -> list[Request]:
        """Requests that run, replica by replica."""
        return [request for part in self.parts for request in part.running]

    @property
    def num_waiting(self) -> int:
        """Requests that wait, on all replicas."""
        return sum(part.num_waiting for part in self.parts)

    @property
    def num_preemptions(self) -> int:
        """Preemptions so far, on all replicas."""
        return sum(part.num_preemptions for part in self.parts)

    @property
    def num_copies(self) -> int:
        """Pages copied on write so far, on all replicas."""
        return sum(part.num_copies for part in self.parts)

    @property
    def adapter_slots(self) -> AdapterSlots:
        """Those of all replicas."""
        return self.parts[0].adapter_slots

    @property
    def slot_utilization(self) -> float:
        """See `utilization`."""
        return utilization(self.running, self.pool.page_size)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return any(part.has_work for part in self.parts)

    def check_fits(self, limit: int) -> None:
        """Raise ValueError if a request of `limit` tokens could not finish even alone."""
        self.parts[0].check_fits(limit)

    def add(self, request: Request) -> None:
        """Queue a request on one replica. Raises ValueError if it could not finish even alone."""
        request.replica = self._route(request)
        self.parts[request.replica].add(request)

    def _route(self, request: Request) -> int:
        if request.parent is not None:
            return request.parent.replica  # where the pages are that it shares
        loads = [len(part.running) + part.num_waiting for part in self.parts]
        return choose_part(request, loads, self.pool.parts, self.slack)

    def schedule(self, steps: int | None = None) -> IterationPlan | None:
        """Plan the next iteration of every replica that has anything to do; `steps` as in `Scheduler.schedule`.

        All run the same program: a decode loop of as many steps as each of them allows, or else a ragged step.
        """
        busy = [part for part in self.parts if part.num_waiting or not all(r.exhausted for r in part.running)]
        if steps is None:
            steps = min((part.loop_steps() for part in busy), default=0)
        plans, drafting, copies, loads = [], [], [], []
        for part in busy:
            if (plan := part.plan(steps)) is not None:
                plans.append(plan)
                drafting.append(part)
                first = self.parts.index(part) * part.pool.num_pages
                loads += plan.loads
                copies += [(first + source, first + target) for source, target in plan.copies]
        if not plans:
            return None
        merged = IterationPlan(
            [chunk for plan in plans for chunk in plan.chunks],
            [request for plan in plans for request in plan.admitted],
            is_decode_loop=all(plan.is_decode_loop for plan in plans),
            num_steps=max(plan.num_steps for plan in plans),
            copies=copies,
            loads=loads,
        )
        if not merged.is_decode_loop:
            return merged
        of_parts, num_rows = zip(drafting, plans, strict=True), max(len(plan.chunks) for plan in plans)
        return replace(merged, chunks=[chunk for part, plan in of_parts for chunk in part.with_drafts(plan, num_rows)])

    def fork(self, parent: Request, child: Request) -> None:
        """See `Scheduler.fork`."""
        self.parts[parent.replica].fork(parent, child)

    def extend(self, request: Request, tokens: Sequence[int]) -> None:
        """See `Scheduler.extend`."""
        self.parts[request.replica].extend(request, tokens)

    def truncate(self, request: Request, length: int) -> None:
        """See `Scheduler.truncate`."""
        self.parts[request.replica].truncate(request, length)

    def detach(self, request: Request) -> list[int]:
        """See `Scheduler.detach`."""
        return self.parts[request.replica].detach(request)

    def restart(self, requests: Sequence[Request]) -> None:
        """See `Scheduler.restart`."""
        for z, part in enumerate(self.parts):
            part.restart([request for request in requests if request.replica == z])

    def loaded(self, load: Load, arrived: Sequence[bool]) -> None:
        """See `Scheduler.loaded`."""
        self.parts[load.owner.replica].loaded(load, arrived)

    def append_tokens(self, request: Request, tokens: Sequence[int], num_samples: int, num_unsure: int = 0) -> None:
        """See `Scheduler.append_tokens`."""
        self.parts[request.replica].append_tokens(request, tokens, num_samples, num_unsure)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, publish: bool = True
    ) -> None:
        """See `Scheduler.finish`."""
        self.parts[request.replica].finish(request, reason, stop_reason, publish=publish)


def choose_part(request: Request, loads: Sequence[int], pools: Sequence[PagePool], slack: int) -> int:
    """Which of several parts a request goes to: see `Replicas`. `loads` are the requests that each has."""
    least = min(range(len(loads)), key=loads.__getitem__)
    if not pools[0].enable_prefix_caching:
        return least
    request.page_hashes = pools[0].hashes(request.token_ids, request.page_salt)  # the same in every pool
    hits = [pool.num_cached(request.page_hashes) for pool in pools]
    best = max(range(len(hits)), key=lambda z: (hits[z], -loads[z]))
    return best if hits[best] and loads[best] < loads[least] + slack else least


class ReplicaPools:
    """The pools of all replicas as one book: figures are sums; single passes take their pages from the first."""

    def __init__(self, parts: Sequence[PagePool]):
        self.parts = list(parts)
        first = self.parts[0]
        self.page_size = first.page_size
        self.pages_for, self.allocate, self.free = first.pages_for, first.allocate, first.free

    def _sum(self, figure: Callable[[PagePool], int]) -> int:
        return sum(figure(part) for part in self.parts)

    @property
    def num_free(self) -> int:
        """Pages that could be handed out."""
        return self._sum(lambda pool: pool.num_free)

    @property
    def num_usable(self) -> int:
        """All pages that requests can ever hold."""
        return self._sum(lambda pool: pool.num_usable)

    @property
    def num_queried_tokens(self) -> int:
        """Prompt tokens looked up."""
        return self._sum(lambda pool: pool.num_queried_tokens)

    @property
    def num_hit_tokens(self) -> int:
        """Prompt tokens found."""
        return self._sum(lambda pool: pool.num_hit_tokens)

    @property
    def num_evictions(self) -> int:
        """Cached pages that were given away."""
        return self._sum(lambda pool: pool.num_evictions)

    @property
    def num_idle(self) -> int:
        """Cached pages that nobody holds."""
        return self._sum(lambda pool: pool.num_idle)

    def evict_idle(self) -> None:
        """Give up every cached page that nobody references."""
        for part in self.parts:
            part.evict_idle()

    def reset_prefix_cache(self) -> None:
        """Forget all content; references stay."""
        for part in self.parts:
            part.reset_prefix_cache()

    def check(self, requests: Sequence[Request]) -> None:
        """Assert that every replica's books balance, given all requests that hold pages."""
        for z, part in enumerate(self.parts):
            part.check([request.pages for request in requests if request.replica == z])
