"""Who may run when in a simulation: the engine's own scheduler, steered from outside.

`Steered` is the engine's `Scheduling` with two things around it. A `Gate` may hold requests back before they reach the
scheduler (the baselines of `policies`). And where nothing can change for a while - every running request decodes, none
ends, nobody can be admitted, nobody arrives - it lets the scheduler plan all those iterations in one plan: the same
tokens, pages and times, at the cost of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.replicas import Replicas, Scheduling
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.tiers import Load
from jaxllm.simulation.level import Level
from jaxllm.simulation.modelled_runner import ModelledRunner

MOST_STEPS = 512  # in one plan: bounds the arrays of its times


class Gate(Protocol):
    """Holds requests back from a scheduler."""

    def hold(self, request: Request) -> None:
        """A request has arrived."""
        ...

    def release(self, scheduler: Scheduling) -> Sequence[Request]:
        """Those that the scheduler shall have before its next plan."""
        ...

    def finished(self, request: Request) -> None:
        """One that was released has ended."""
        ...

    def __len__(self) -> int:
        """Requests held."""
        ...


class Steered:
    """The engine's scheduler with a gate before it and a look ahead; see the head of this file.

    Attributes:
        horizon: when the next request arrives; infinite where none will.
        is_paused: nothing new is planned.
        plan_with: how the inner scheduler plans one iteration; a baseline may plan otherwise.
    """

    def __init__(
        self,
        inner: Scheduling,
        runner: ModelledRunner,
        gate: Gate | None = None,
        plan_with: Callable[[Scheduling], IterationPlan | None] = lambda inner: inner.schedule(),
    ):
        self.inner, self.runner, self.gate = inner, runner, gate
        self.plan_with = plan_with
        self.horizon = math.inf
        self.is_paused = False  # nothing new is planned; what is in flight ends
        self.parts: list[Scheduler] = inner.parts if isinstance(inner, Replicas) else [inner]  # type: ignore[list-item]
        self.queue_level, self.running_level = Level(), Level()  # requests, over time
        self._is_stuck = False  # the last plan could admit nobody, and nothing has changed since

    def schedule(self, steps: int | None = None) -> IterationPlan | None:
        """See `Scheduling.schedule`; the plan may stand for many iterations."""
        if self.is_paused:
            return None
        waiting, running, now = self.num_waiting, len(self.running), self.runner.clock.now
        plan = self._schedule(steps)
        self.queue_level.change(now, self.num_waiting - waiting)
        self.running_level.change(now, len(self.running) - running)
        return plan

    def _schedule(self, steps: int | None) -> IterationPlan | None:
        if self.gate is not None and len(self.gate):
            for request in self.gate.release(self.inner):
                self.inner.add(request)
                self._is_stuck = False
        if steps is not None:
            return self.inner.schedule(steps)
        steps = self._free_steps()
        if steps > 1:
            self.runner.skipping = True
            return self.inner.schedule(steps)
        preempted = self.inner.num_preemptions
        plan = self.plan_with(self.inner)
        self._is_stuck = (
            plan is not None and plan.is_decode_loop and not plan.admitted and self.inner.num_preemptions == preempted
        )
        return plan

    def _free_steps(self) -> int:
        """Iterations in which nothing can change; 0 or 1 where the next must be looked at."""
        if not any(part.running for part in self.parts):
            return 0  # a request may have ended while an iteration of its drafts is still on its way
        steps = MOST_STEPS
        for part in self.parts:
            if part.running or part.num_waiting:
                steps = min(steps, self._free_steps_of(part, steps))
                if steps < 2:
                    return 0
        return self._before_arrival(steps)

    def _free_steps_of(self, part: Scheduler, most: int) -> int:
        running, streamed = part.running, False
        if part.num_drafts:
            return 0  # how many tokens come is not known
        steps = most
        for request in running:
            if request.held.load is not None or request.on_hold or request.stepwise or request.may_stop:
                return 0
            streamed = streamed or request.streamed
            length = request.num_tokens
            if length - request.held.num_computed != 1 or length >= request.limit:
                return 0
            steps = min(steps, request.limit - length)
        if not streamed and part.max_decode_steps > 1:
            return 0  # the scheduler has decode loops of its own here
        if part.num_waiting and not self._is_stuck and len(running) < part.max_num_seqs:
            return 0
        free = part.pool.num_free
        while steps > 1 and free < sum([part.page_lists.missing(r, r.num_tokens - 1 + steps) for r in running]):
            steps //= 2
        return steps if running else 0

    def _before_arrival(self, steps: int) -> int:
        """So many of these that whoever arrives finds the plan not made yet that could admit them."""
        if steps < 2 or math.isinf(self.horizon) or all(map(self._is_closed, self.parts)):
            return steps
        runner = self.runner
        rows = [Chunk(r, r.num_tokens - 1, 1, steps) for part in self.parts for r in part.running]
        start = max(runner.clock.now + runner.host_s, runner.free_at)
        durations = np.maximum(runner.durations(rows, steps, runner.decode_program), runner.host_s)
        ends = start + np.cumsum(durations)
        # Iteration i + 2 is planned when iteration i ends.
        return min(steps, int(np.searchsorted(ends, self.horizon)) + 1)

    def _is_closed(self, part: Scheduler) -> bool:
        """Whether nobody who arrives can be admitted before somebody ends."""
        return len(part.running) >= part.max_num_seqs or (part.num_waiting > 0 and self._is_stuck)

    # What is the scheduler's own.

    @property
    def adapter_slots(self):
        return self.inner.adapter_slots

    @property
    def pool(self):
        return self.inner.pool

    @property
    def running(self) -> list[Request]:
        return self.inner.running

    @property
    def num_waiting(self) -> int:
        return self.inner.num_waiting + (len(self.gate) if self.gate is not None else 0)

    @property
    def num_preemptions(self) -> int:
        return self.inner.num_preemptions

    @property
    def num_copies(self) -> int:
        return self.inner.num_copies

    @property
    def slot_utilization(self) -> float:
        return self.inner.slot_utilization

    @property
    def has_work(self) -> bool:
        return self.inner.has_work or (self.gate is not None and len(self.gate) > 0)

    def check_fits(self, limit: int) -> None:
        self.inner.check_fits(limit)

    def add(self, request: Request) -> None:
        if self.gate is not None:
            self.gate.hold(request)
        else:
            self.inner.add(request)
            if self.parts[request.replica].num_waiting == 1:  # else it waits behind whoever could not be admitted
                self._is_stuck = False
        # The clock may have passed its arrival: nobody looked up.
        self.queue_level.change(min(self.runner.clock.now, self.horizon), 1)

    def fork(self, parent: Request, child: Request) -> None:
        self.inner.fork(parent, child)

    def extend(self, request: Request, tokens: Sequence[int]) -> None:
        self.inner.extend(request, tokens)

    def truncate(self, request: Request, length: int) -> None:
        self.inner.truncate(request, length)

    def detach(self, request: Request) -> list[int]:
        return self.inner.detach(request)

    def restart(self, requests: Sequence[Request]) -> None:
        self.inner.restart(requests)

    def loaded(self, load: Load, arrived: Sequence[bool]) -> None:
        self._is_stuck = False
        self.inner.loaded(load, arrived)

    def append_tokens(self, request: Request, tokens: Sequence[int], num_samples: int, num_unsure: int = 0) -> None:
        self.inner.append_tokens(request, tokens, num_samples, num_unsure)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, publish: bool = True
    ) -> None:
        self._is_stuck = False
        running = len(self.running)
        self.inner.finish(request, reason, stop_reason, publish=publish)
        self.running_level.change(self.runner.clock.now, len(self.running) - running)
        if self.gate is not None:
            self.gate.finished(request)
