"""The engine's figures in one dictionary: what is queued, what the cache holds, what has been done and how fast.

Reads the scheduler, the pool, the runner and the books; changes nothing. Names are those dashboards know.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.engine.engine import Engine
from jaxllm.telemetry.cache_metrics import cache_figures


def engine_metrics(engine: Engine) -> dict[str, Any]:
    """Gauges, `*_total` sums since the engine started, and rates of the last iterations.

    `mfu` and `mbu` (fractions of `ceilings`) and the `*_per_s` are per second of device time over the last 64
    iterations that compiled nothing; they are None while the ceilings are unknown or nothing has run.
    """
    pool, scheduler, runner, books = engine.pool, engine.scheduler, engine.runner, engine.accounting
    totals, queried = books.totals, pool.num_queried_tokens
    return {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": scheduler.num_waiting,
        "kv_cache_usage_perc": 1 - pool.num_free / pool.num_usable,
        "prefix_cache_queries_total": queried,
        "prefix_cache_hits_total": pool.num_hit_tokens,
        "prefix_cache_hit_rate": pool.num_hit_tokens / queried if queried else 0.0,
        **{f.name + ("_total" if f.kind == "counter" else ""): f.value for f in cache_figures(engine)},
        "num_preemptions_total": scheduler.num_preemptions,
        "compilations_total": runner.num_compilations,
        "compilations_after_warmup_total": runner.num_compilations_after_warmup,
        "iterations_total": totals.num_iterations,
        "prefill_tokens_total": totals.prefill_tokens,
        "generation_tokens_total": totals.generation_tokens,
        "flops_total": totals.flops,
        "bytes_total": totals.bytes,
        "device_seconds_total": totals.seconds,
        **books.recent(),
        "ceilings": dataclasses.asdict(books.ceilings) if books.ceilings else None,
    }
