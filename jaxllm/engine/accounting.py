"""What each iteration did and how near to the roofline it came: plans and what was sampled -> `IterationRecord`s.

Plain Python, sums over rows only: it costs the host a few microseconds per iteration. Knows the costs of a model
and the ceilings of a machine as numbers; nothing of arrays or text. Not safe for two threads.

The device runs ahead of the host, so what can be seen is when the results of an iteration arrive. Its seconds are
the time since the results of the one before arrived (or since its dispatch, where the device was idle). An
iteration that samples nothing is never waited for: it shares the time of the next that is, by FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxllm.engine.scheduler import Chunk, IterationPlan
from jaxllm.roofline.cost_model import Cost, ModelCost

_RECENT = 64  # iterations behind the recent rates


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the whole mesh could do at best, and where the figures come from."""

    flops_per_s: float
    bytes_per_s: float
    source: str


class _Work(NamedTuple):
    """The first fields of an `IterationRecord`: all that is known before its time is."""

    num_tokens: int
    num_decodes: int
    num_steps: int
    request_ids: tuple[str, ...]
    num_prefill_tokens: int
    num_sampled: int
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """What one dispatched plan did; a decode loop is one plan of several steps.

    Attributes:
        num_tokens: tokens of one step, as planned. num_decodes: rows of one token.
        num_steps: steps that were allowed; fewer ran where every row stopped.
        num_prefill_tokens, num_sampled: over all steps that ran.
        flops, bytes: of the model and its cache, over all devices.
        seconds: of the iteration itself, pipeline latency excluded; None where it could not be seen.
        mfu, mbu: fractions of the ceilings; None where these or the seconds are unknown, or a program was compiled.
    """

    num_tokens: int
    num_decodes: int
    num_steps: int
    request_ids: tuple[str, ...]
    num_prefill_tokens: int
    num_sampled: int
    flops: float
    bytes: float
    seconds: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    compiled: bool = False


@dataclass(slots=True)
class Totals:
    """Sums over iterations."""

    num_iterations: int = 0
    prefill_tokens: int = 0
    generation_tokens: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, record: IterationRecord) -> None:
        """Count one iteration."""
        self.num_iterations += 1
        self.prefill_tokens += record.num_prefill_tokens
        self.generation_tokens += record.num_sampled
        self.flops += record.flops
        self.bytes += record.bytes
        self.seconds += record.seconds or 0.0

    def since(self, before: Totals) -> Totals:
        """What came after an earlier copy of these."""
        names = (field.name for field in dataclasses.fields(self))
        return Totals(*(getattr(self, name) - getattr(before, name) for name in names))

    def rates(self, ceilings: Ceilings | None) -> dict[str, float | None]:
        """Tokens per second of device time, and utilisation where the ceilings are known."""
        s = self.seconds
        return {
            "prefill_tokens_per_s": self.prefill_tokens / s if s else 0.0,
            "generation_tokens_per_s": self.generation_tokens / s if s else 0.0,
            "mfu": self.flops / s / ceilings.flops_per_s if ceilings and s else None,
            "mbu": self.bytes / s / ceilings.bytes_per_s if ceilings and s else None,
        }


@dataclass(slots=True)
class Accounting:
    """The books of one engine: a cost model, the ceilings once they are known, totals and recent records."""

    model: ModelCost
    ceilings: Ceilings | None = None
    totals: Totals = field(default_factory=Totals)
    _recent: deque[IterationRecord] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _unseen: list[_Work] = field(default_factory=list)  # done or not: nobody waited for them
    _last_arrival: float = 0.0
    _last_seen: float = 0.0
    _num_compilations: int = 0

    def arrived(
        self, plan: IterationPlan, results: Sequence[tuple[Chunk, Any]], *, dispatched: float, now: float,
        num_compilations: int,
    ) -> list[IterationRecord]:  # fmt: skip
        """The results of `plan` are here. Returns the records that this completes, oldest first.

        Args:
            plan: what was dispatched.
            results: each sampling chunk with what it sampled (`.tokens`), as `InFlight.read` gives them.
            dispatched, now: in seconds of one clock.
            num_compilations: of the runner so far; where it has grown, the time was not the device's.
        """
        done: list[IterationRecord] = []
        if dispatched > self._last_arrival:  # the device had run dry: what it did before ended unseen
            done, self._unseen = [IterationRecord(*work) for work in self._unseen], []
            self._last_seen = dispatched
        self._last_arrival = now
        self._unseen.append(self._work(plan, results))
        if results:
            compiled, self._num_compilations = num_compilations > self._num_compilations, num_compilations
            done += _timed(self._unseen, now - self._last_seen, self.ceilings, compiled)
            self._unseen, self._last_seen = [], now
        for record in done:
            self.totals.add(record)
            if record.seconds and not record.compiled:
                self._recent.append(record)
        return done

    def recent(self) -> dict[str, float | None]:
        """Rates over the last iterations that were seen and compiled nothing."""
        return summed(self._recent).rates(self.ceilings)

    def _work(self, plan: IterationPlan, results: Sequence[tuple[Chunk, Any]]) -> _Work:
        """What the plan came to."""
        chunks = plan.chunks
        counts = [chunk.count for chunk in chunks]
        if plan.is_decode_loop:
            cost, num_sampled = self._loop_cost(results)
        else:
            cost, num_sampled = self._step_cost(chunks, sum(counts), len(results)), len(results)
        return _Work(
            num_tokens=sum(counts),
            num_decodes=counts.count(1),
            num_steps=plan.num_steps,
            request_ids=tuple([chunk.request.request_id for chunk in chunks]),
            num_prefill_tokens=sum([c.count for c in chunks if c.count > 1 or c.start < c.request.num_prompt]),
            num_sampled=num_sampled,
            flops=cost.flops,
            bytes=cost.bytes,
        )

    def _step_cost(self, chunks: Sequence[Chunk], num_tokens: int, num_samples: int) -> Cost:
        pairs, keys = self.model.attended([(c.count, c.start + c.count) for c in chunks])
        return self.model.cost(tokens=num_tokens, samples=num_samples, pairs=pairs, keys=keys)

    def _loop_cost(self, results: Sequence[tuple[Chunk, Any]]) -> tuple[Cost, int]:
        """One token per step and row, so the keys that are read are the pairs; idle steps cost nothing."""
        counts = [len(sampled.tokens) for _, sampled in results]
        rows = [(n, chunk.start + n) for n, (chunk, _) in zip(counts, results, strict=True)]
        pairs, _ = self.model.attended(rows)
        num = sum(counts)
        return self.model.cost(tokens=num, samples=num, pairs=pairs, keys=pairs, passes=max(counts, default=0)), num


def summed(records: Iterable[IterationRecord]) -> Totals:
    """Totals of some iterations."""
    totals = Totals()
    for record in records:
        totals.add(record)
    return totals


def _timed(group: Sequence[_Work], seconds: float, ceilings: Ceilings | None, compiled: bool) -> list[IterationRecord]:
    """Share the time of iterations that were waited for together by their FLOPs."""
    flops = sum(work.flops for work in group) or 1.0
    records = []
    for work in group:
        mine = seconds * work.flops / flops
        mfu = mbu = None
        if ceilings is not None and mine > 0 and not compiled:
            mfu = work.flops / mine / ceilings.flops_per_s
            mbu = work.bytes / mine / ceilings.bytes_per_s
        records.append(IterationRecord(*work, mine, mfu, mbu, compiled))
    return records
