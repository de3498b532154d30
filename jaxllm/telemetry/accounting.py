"""What each iteration did and how near to the roofline it came: plans and what was sampled -> `IterationRecord`s.

Plain Python, sums over rows only: it costs the host a few microseconds per iteration. Knows the costs of a model
and the ceilings of a machine as numbers; nothing of arrays or text. Not safe for two threads.

The device runs ahead of the host, so what can be seen is when the results of an iteration arrive. Its seconds are
the time since the results of the one before arrived, or since its dispatch, where the device was idle.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.roofline.cost_model import Cost, ModelCost
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.telemetry.drafts import LoopDrafts

_RECENT = 64  # iterations behind the recent rates


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the whole mesh could do at best, and where the figures come from."""

    flops_per_s: float
    bytes_per_s: float
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which compute and memory take equally long."""
        return self.flops_per_s / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """What one dispatched plan did; a decode loop is one plan of several steps.

    Attributes:
        num_tokens: tokens of one step, as planned. num_decodes: rows of one token.
        num_steps: steps that were allowed; fewer ran where every row stopped.
        num_prefill_tokens, num_sampled: over all steps that ran.
        flops, bytes: of the model and its cache, over all devices.
        seconds: of the iteration itself, pipeline latency excluded.
        compiled: a program was compiled meanwhile, so the time is not the device's.
        mfu, mbu: fractions of the ceilings; None where these are unknown or a program was compiled.
    """

    num_tokens: int
    num_decodes: int
    num_steps: int
    request_ids: tuple[str, ...]
    num_prefill_tokens: int
    num_sampled: int
    flops: float
    bytes: float
    seconds: float
    compiled: bool
    mfu: float | None
    mbu: float | None

    def line(self) -> str:
        """For a log."""
        return (
            f"iteration of {self.num_tokens} tokens x {self.num_steps} ({self.num_decodes} decodes): "
            f"{1e3 * self.seconds:.1f} ms, MFU {percent(self.mfu)}, MBU {percent(self.mbu)}"
        )


def percent(fraction: float | None) -> str:
    """`12.3%`, or that it is not known."""
    return "unknown" if fraction is None else f"{fraction:.1%}"


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
        self.seconds += record.seconds

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
    _last_arrival: float = 0.0
    _num_compilations: int = 0

    def arrived(
        self,
        plan: IterationPlan,
        results: Sequence[tuple[Chunk, Any]],
        *,
        dispatched: float,
        now: float,
        num_compilations: int,
        drafts: LoopDrafts | None = None,
    ) -> IterationRecord:
        """The results of `plan` are here: what it did.

        Args:
            plan: what was dispatched.
            results: each sampling chunk with what it sampled (`.tokens`), as `InFlight.read` gives them.
            dispatched, now: in seconds of one clock.
            num_compilations: of the runner so far; where it has grown, the time was not the device's.
            drafts: of a decode loop that may have had some: what became of them.
        """
        seconds = now - max(dispatched, self._last_arrival)
        compiled = num_compilations > self._num_compilations
        self._last_arrival, self._num_compilations = now, num_compilations
        record = self._record(plan, results, seconds, compiled, drafts)
        self.add(record)
        return record

    def add(self, record: IterationRecord) -> None:
        """Count one iteration; one that compiled is no measure of the device and stays out of the recent rates."""
        self.totals.add(record)
        if not record.compiled:
            self._recent.append(record)

    def recent(self) -> dict[str, float | None]:
        """Rates over the last iterations that compiled nothing."""
        return summed(self._recent).rates(self.ceilings)

    def prefill_rate(self) -> float:
        """Tokens per second of the recent iterations that were mostly prefill; 0 where there were none."""
        mostly = [r for r in self._recent if 2 * r.num_prefill_tokens > r.num_tokens * r.num_steps]
        seconds = sum(r.seconds for r in mostly)
        return sum(r.num_tokens for r in mostly) / seconds if seconds else 0.0

    def _record(
        self,
        plan: IterationPlan,
        results: Sequence[tuple[Chunk, Any]],
        seconds: float,
        compiled: bool,
        drafts: LoopDrafts | None,
    ) -> IterationRecord:
        chunks = plan.chunks
        counts = [chunk.count for chunk in chunks]
        if drafts is not None:
            cost, num_sampled = self._speculating_cost(results, drafts)
        elif plan.is_decode_loop:
            cost, num_sampled = self._loop_cost(results)
        else:
            cost, num_sampled = self._step_cost(chunks, sum(counts), len(results)), len(results)
        ceilings = None if compiled or seconds <= 0 else self.ceilings
        return IterationRecord(
            num_tokens=sum(counts),
            num_decodes=counts.count(1),
            num_steps=plan.num_steps,
            request_ids=tuple([chunk.request.request_id for chunk in chunks]),
            num_prefill_tokens=sum([c.count for c in chunks if c.count > 1 or c.start < c.request.num_prompt]),
            num_sampled=num_sampled,
            flops=cost.flops,
            bytes=cost.bytes,
            seconds=seconds,
            compiled=compiled,
            mfu=cost.flops / seconds / ceilings.flops_per_s if ceilings else None,
            mbu=cost.bytes / seconds / ceilings.bytes_per_s if ceilings else None,
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

    def _speculating_cost(self, results: Sequence[tuple[Chunk, Any]], drafts: LoopDrafts) -> tuple[Cost, int]:
        """As `_loop_cost`, with the drafts that were wrong; a row begins where what was read of it ends."""
        num = sum(len(sampled.tokens) for _, sampled in results)
        rows = []
        for (chunk, sampled), (_, drafted, accepted) in zip(results, drafts.by_chunk, strict=True):
            queries = len(sampled.tokens) + sum(drafted) - sum(accepted)
            rows.append((queries, len(chunk.request.token_ids) - 1 + queries))
        pairs, _ = self.model.attended(rows)
        tokens = sum(queries for queries, _ in rows)
        return self.model.cost(tokens=tokens, samples=tokens, pairs=pairs, keys=pairs, passes=drafts.num_passes), num


def summed(records: Iterable[IterationRecord]) -> Totals:
    """Totals of some iterations."""
    totals = Totals()
    for record in records:
        totals.add(record)
    return totals
