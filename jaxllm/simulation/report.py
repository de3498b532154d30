"""The figures of a simulation: outcomes of requests and books of engines -> one JSON object, or lines for a person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.simulation.fleet import Fleet, Results
from jaxllm.simulation.paper_engine import PaperEngine

PERCENTILES = (50, 90, 99)


def make_report(
    results: Results, fleet: Fleet, *, slo: dict[str, float], price_per_hour: float | None = None
) -> dict[str, Any]:
    """Keys as in `jaxllm simulate --json`.

    Args:
        results: of the run.
        fleet: that ran it.
        slo: limits in seconds; none: everything that ends is good.
        price_per_hour: of one device.
    """
    outcomes, duration = results.outcomes, max(results.duration_s, 1e-9)
    ended = [outcome for outcome in outcomes if not math.isnan(outcome.finished)]
    good = sum(outcome.meets(slo) for outcome in ended)
    prompt_tokens = sum(outcome.num_prompt for outcome in ended)
    output_tokens = sum(outcome.num_tokens for outcome in ended)
    devices = results.num_devices
    report: dict[str, Any] = {
        "requests": len(outcomes),
        "completed": len(ended),
        "num_devices": devices,
        "duration_s": results.duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "request_throughput": len(ended) / duration,
        "output_tokens_per_s": output_tokens / duration,
        "goodput": good / duration,
        "goodput_per_device": good / duration / devices,
        "slo": {name: 1e3 * limit for name, limit in slo.items()},
        "slo_attainment": good / len(outcomes) if outcomes else 1.0,
        "ttft_ms": percentiles([outcome.ttft for outcome in ended]),
        "tpot_ms": percentiles([outcome.tpot for outcome in ended if outcome.num_tokens > 1]),
        "itl_ms": weighted_percentiles(*results.gaps.weighted()),
        "e2e_ms": percentiles([outcome.e2e for outcome in ended]),
        "prefix_hit_tokens": sum(outcome.num_cached for outcome in ended),
        **_books(fleet.engines, duration),
        **_prefixes(fleet),
        **results.figures,
    }
    if results.num_rejected:
        report["rejected"] = results.num_rejected
    if price_per_hour is not None:
        cost = price_per_hour * devices * duration / 3600
        report["cost"] = cost
        report["cost_per_million_output_tokens"] = 1e6 * cost / max(1, output_tokens)
        report["cost_per_million_tokens"] = 1e6 * cost / max(1, output_tokens + prompt_tokens)
    return report


def _books(engines: Sequence[PaperEngine], duration: float) -> dict[str, Any]:
    totals = [engine.engine.accounting.totals for engine in engines]
    ceilings = [engine.engine.accounting.ceilings for engine in engines]
    flops_per_s = sum(ceiling.flops_per_s for ceiling in ceilings if ceiling)
    bytes_per_s = sum(ceiling.bytes_per_s for ceiling in ceilings if ceiling)
    busy = sum(engine.runner.busy_s * engine.num_devices for engine in engines)
    return {
        "iterations": sum(engine.runner.num_iterations for engine in engines),
        "preemptions": sum(engine.scheduling.num_preemptions for engine in engines),
        "utilization": min(1.0, busy / duration / sum(engine.num_devices for engine in engines)),
        "mfu": sum(t.flops for t in totals) / duration / flops_per_s,
        "mbu": sum(t.bytes for t in totals) / duration / bytes_per_s,
    }


def _prefixes(fleet: Fleet) -> dict[str, Any]:
    pools = [engine.scheduling.pool for engine in fleet.prompt_engines]
    queried = sum(pool.num_queried_tokens for pool in pools)
    return {"prefix_cache_hit_rate": sum(pool.num_hit_tokens for pool in pools) / queried if queried else 0.0}


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds."""
    if not seconds:
        return {"mean": None, **{f"p{p}": None for p in PERCENTILES}}
    values = 1e3 * np.percentile(seconds, PERCENTILES)
    return {
        "mean": 1e3 * float(np.mean(seconds)),
        **{f"p{p}": v for p, v in zip(PERCENTILES, values.tolist(), strict=True)},
    }


def weighted_percentiles(seconds: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    """In milliseconds: the least value that has so much of the weight at or below it."""
    total = float(weights.sum())
    if not total:
        return {"mean": None, **{f"p{p}": None for p in PERCENTILES}}
    order = np.argsort(seconds)
    below = np.cumsum(weights[order])
    at = np.searchsorted(below, total * np.array(PERCENTILES) / 100)
    values = 1e3 * seconds[order][np.minimum(at, len(order) - 1)]
    mean = 1e3 * float((seconds * weights).sum() / total)
    return {"mean": mean, **{f"p{p}": v for p, v in zip(PERCENTILES, values.tolist(), strict=True)}}


def format_report(report: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [
        f"{report['completed']:,} of {report['requests']:,} requests in {report['duration_s']:,.1f} s on "
        f"{report['num_devices']} devices: {report['request_throughput']:.2f} requests/s, "
        f"{report['output_tokens_per_s']:,.0f} output tokens/s",
        f"goodput {report['goodput_per_device']:.3f} requests/s per device, SLO {_slo(report)} met by "
        f"{report['slo_attainment']:.1%}",
        f"{'':<8}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}  ms",
    ]
    for metric in ("ttft", "tpot", "itl", "e2e"):
        values = report[f"{metric}_ms"].values()
        lines.append(f"{metric:<8}" + "".join(f"{'-' if v is None else format(v, ',.1f'):>10}" for v in values))
    lines.append(
        f"{report['iterations']:,} iterations, devices busy {report['utilization']:.1%} of the time, MFU "
        f"{report['mfu']:.1%}, MBU {report['mbu']:.1%}; {report['prefix_hit_tokens']:,} prompt tokens found in the "
        f"cache ({report['prefix_cache_hit_rate']:.1%}), {report['preemptions']:,} preemptions"
    )
    if "cost" in report:
        lines.append(
            f"{report['cost']:,.2f} in all, {report['cost_per_million_output_tokens']:,.3f} per million output tokens, "
            f"{report['cost_per_million_tokens']:,.3f} per million tokens of prompt and output"
        )
    return "\n".join(lines)


def _slo(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {limit:g} ms" for name, limit in report["slo"].items()) or "none"
