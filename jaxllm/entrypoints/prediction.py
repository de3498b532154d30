"""When the first token of a request would come, and how long a token takes, from what an engine's iterations took.

Recent iterations with prompts give a line: so many seconds each, and so many per operation. A new prompt takes the
iterations and operations that are left before it, by the scheduler's own rules: short prompts pass long ones, and take
half of each iteration beside one; beside answers that are read along, iterations are as short as the pace has them.
Plain Python; reads queues and records, changes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.engine.engine import Engine
from jaxllm.scheduling.request import Request
from jaxllm.telemetry.accounting import IterationRecord

RECENT = 256  # iterations that are looked at
_FEWEST = 4  # records with different work that a line is drawn through
Row = tuple[int, int]  # tokens to compute, and the length that the last of them attends to


@dataclass(frozen=True, slots=True)
class IterationCost:
    """What iterations with prompts take: `seconds = iteration + operation * operations`."""

    iteration: float
    operation: float


def recent(engine: Engine) -> list[IterationRecord]:
    """Records that are a measure of the device."""
    return [record for record in list(engine.records)[-RECENT:] if not record.compiled]


def iteration_cost_of(engine: Engine) -> IterationCost | None:
    """How fast prompts are computed, or None while none was."""
    records = [r for r in recent(engine) if 2 * r.num_prefill_tokens > r.num_tokens]
    seconds, work = [r.seconds for r in records], [r.flops for r in records]
    if not sum(seconds) or not sum(work):
        return None
    if len({*work}) >= _FEWEST:
        slope, start = statistics.linear_regression(work, seconds)
        if slope > 0 and start > 0:
            return IterationCost(start, slope)
    return IterationCost(0.0, sum(seconds) / sum(work))


def prompt_seconds(engine: Engine, pace: IterationCost, waiting: Sequence[Row], new: Sequence[Row]) -> float:
    """Seconds until the last of the `new` rows is computed, with what is under way before it.

    Args:
        engine: that computes prompts.
        pace: its own.
        waiting: prompts before them that the engine does not know yet.
        new: the prompts asked about.
    """
    unfinished = [r for r in engine.unfinished if not r.finished]
    ahead = [*waiting, *((r.num_left, r.num_tokens) for r in unfinished if r.num_left > 1)]
    decodes = [(1, r.num_tokens) for r in unfinished if r.num_left == 1 and r.slot >= 0]
    half = engine.runner.shapes.max_num_batched_tokens // 2
    budget = _budget(engine, unfinished, len(decodes))
    long = [row for row in ahead if row[0] > half]
    if long and all(count <= half for count, _ in new):
        rows = [*(row for row in ahead if row[0] <= half), *new]
        iterations = -(-sum(count for count, _ in rows) // max(1, budget - budget // 2))
        count, length = long[0]
        beside = min(count, iterations * (budget // 2))
        rows.append((beside, length - count + beside))
    else:
        rows = [*ahead, *new]
        iterations = -(-sum(count for count, _ in rows) // max(1, budget - len(decodes)))
    work = operations(engine, rows) + iterations * operations(engine, decodes)
    return iterations * pace.iteration + work * pace.operation + _under_way(engine)


def _budget(engine: Engine, unfinished: Sequence[Request], num_decodes: int) -> int:
    """Tokens of each iteration: beside answers that somebody reads along, what the pace leaves."""
    most = engine.runner.shapes.max_num_batched_tokens
    return min(most, engine.pace.most(max(1, num_decodes))) if any(r.streamed for r in unfinished) else most


def operations(engine: Engine, rows: Sequence[Row]) -> float:
    """Of the model, over these rows."""
    if not rows:
        return 0.0
    model = engine.accounting.model
    pairs, keys = model.attended(rows)
    return model.cost(tokens=sum(count for count, _ in rows), samples=len(rows), pairs=pairs, keys=keys).flops


def _under_way(engine: Engine) -> float:
    """Seconds until the device is done with what it has been given: half of the first iteration, all of the others."""
    records = recent(engine)[-_FEWEST:]
    if not engine.num_in_flight or not records:
        return 0.0
    return (engine.num_in_flight - 0.5) * statistics.mean(r.seconds for r in records)


def token_seconds(engine: Engine, num_new: int) -> float | None:
    """Seconds per token with so many requests more, or None while no decode was measured.

    A line through recent iterations' seconds over the rows that decoded in them.
    """
    records = [r for r in recent(engine) if r.num_decodes and r.num_sampled]
    if not records:
        return None
    rows = [float(r.num_decodes) for r in records]
    seconds = [r.seconds * r.num_decodes / r.num_sampled for r in records]
    now = len(engine.scheduler.running) + num_new
    if len({*rows}) < 2:
        return statistics.mean(seconds)
    slope, start = statistics.linear_regression(rows, seconds)
    return max(min(seconds), start + max(0.0, slope) * now)


def slot_seconds(engine: Engine, num_new: int) -> float:
    """Seconds until so many more requests have slots, from what the running ones may still generate."""
    scheduler, slots = engine.scheduler, engine.runner.shapes.spare_slot
    running: list[Request] = list(scheduler.running)
    lacking = len(running) + scheduler.num_waiting + num_new - slots
    if lacking <= 0 or not running:
        return 0.0
    left = sorted(request.limit - request.num_tokens for request in running)
    return left[min(lacking, len(left)) - 1] * (token_seconds(engine, 0) or 0.0)
