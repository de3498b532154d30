"""What a plan makes one replica do, as numbers that its time depends on: chunks -> `IterationWork`. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.roofline.cost_model import ModelCost
from jaxllm.roofline.iteration_time import DECODE, LOOP, RAGGED, IterationWork
from jaxllm.scheduling.plan import Chunk, IterationPlan


def program_of(plan: IterationPlan) -> str:
    """What runs it."""
    if not plan.is_decode_loop:
        return RAGGED
    return LOOP if plan.num_steps > 1 else DECODE


def iteration_work(
    chunks: Sequence[Chunk], program: str, cost: ModelCost, *, step: int = 0, admitted: int = 0
) -> IterationWork:
    """Of one iteration; in a loop of the `step`-th, where every row is so many tokens longer."""
    singles = [(1, chunk.start + 1 + step) for chunk in chunks if chunk.count == 1]
    _, decode_keys = cost.attended(singles)
    if len(singles) == len(chunks):
        samples = len(chunks) if program != RAGGED else sum([chunk.num_samples for chunk in chunks])
        return IterationWork(program, len(chunks), samples, 0, 0, decode_keys, admitted)
    rows = [(chunk.count, chunk.start + chunk.count) for chunk in chunks if chunk.count > 1]
    pairs, keys = cost.attended(rows)
    tokens = len(singles) + sum([count for count, _ in rows])
    samples = sum([chunk.num_samples > 0 for chunk in chunks])
    return IterationWork(RAGGED, tokens, samples, pairs, keys, decode_keys, admitted)
