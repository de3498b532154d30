"""A trace through the real scheduler and page pool without a model: what is reused, what is wasted, who is preempted.

Prompts and output lengths in, sums out. Requests come as fast as the scheduler takes them, in the trace's order; every
sampled token is a new one, so that only prompts are ever shared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.bench.workload import TRACE_BLOCK, trace_rows
from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler

_MAX_QUEUED = 4  # requests that wait in the scheduler; the rest stays in the file


def trace_requests(path: Path, num_requests: int | None = None) -> Iterator[tuple[list[int], int]]:
    """Token ids and output length of a trace's first requests; equal tokens where blocks have equal ids."""
    for i, (_, input_len, output_len, blocks) in enumerate(itertools.islice(trace_rows(path), num_requests)):
        if input_len < 1 or output_len < 1:
            continue
        ids = [block for block in blocks for _ in range(TRACE_BLOCK)] if blocks else [-2 - i] * input_len
        yield ids[:input_len], output_len


def replay(requests: Iterable[tuple[list[int], int]], scheduler: Scheduler) -> dict[str, Any]:
    """Run all requests to their end; see `format_report` for the figures.

    Raises ValueError where a request is larger than the page pool.
    """
    pool, waiting, fresh = scheduler.pool, iter(requests), itertools.count(1 << 40)
    sums = {"num_requests": 0, "prompt_tokens": 0, "computed_tokens": 0, "num_iterations": 0}
    used = slots = 0.0
    params, more = SamplingParams(), True
    while more or scheduler.has_work:
        while more and scheduler.num_waiting < _MAX_QUEUED:
            if (item := next(waiting, None)) is None:
                more = False
                break
            ids, output_len = item
            scheduler.add(Request(f"{sums['num_requests']}", ids, params, limit=len(ids) + output_len))
            sums["num_requests"] += 1
            sums["prompt_tokens"] += len(ids)
        if (plan := scheduler.schedule()) is None:
            continue
        sums["num_iterations"] += 1
        sums["computed_tokens"] += sum(chunk.count + max(0, chunk.num_samples - 1) for chunk in plan.chunks)
        held = sum(len(request.pages) for request in scheduler.running) * pool.page_size
        used, slots = used + held * scheduler.slot_utilization, slots + held
        _finish(plan, scheduler, fresh)
    return {
        **sums,
        "prefix_cache_queries": pool.num_queried_tokens,
        "prefix_cache_hits": pool.num_hit_tokens,
        "prefix_cache_hit_rate": pool.num_hit_tokens / max(1, pool.num_queried_tokens),
        "slot_utilization": used / slots if slots else 1.0,
        "num_evictions": pool.num_evictions,
        "num_preemptions": scheduler.num_preemptions,
    }


def _finish(plan: IterationPlan, scheduler: Scheduler, fresh: Iterator[int]) -> None:
    for chunk in plan.chunks:
        if not chunk.num_samples:
            continue
        scheduler.append_tokens(chunk.request, list(itertools.islice(fresh, chunk.num_samples)), chunk.num_samples)
        if len(chunk.request.token_ids) >= chunk.request.limit:
            scheduler.finish(chunk.request, "length")


def format_report(report: dict[str, Any]) -> str:
    """Two lines for a person."""
    return (
        f"{report['num_requests']:,} requests, {report['prompt_tokens']:,} prompt tokens: "
        f"{report['prefix_cache_hit_rate']:.2%} found in the prefix cache, {report['num_evictions']:,} evictions\n"
        f"{report['slot_utilization']:.2%} of the token slots in use, {report['num_iterations']:,} iterations, "
        f"{report['num_preemptions']:,} preemptions"
    )
