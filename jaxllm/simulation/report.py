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
        **_levels(results, fleet),
        **_prefixes(fleet),
        **_speculation(fleet),
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


def _levels(results: Results, fleet: Fleet) -> dict[str, Any]:
    """Requests that wait and that run at one engine, over time."""
    start = min((outcome.at for outcome in results.outcomes), default=0.0)
    end, found = start + results.duration_s, {}
    for name, attribute in (("queue", "queue_level"), ("running", "running_level")):
        parts = [getattr(engine.scheduling, attribute).weighted(start, end) for engine in fleet.engines]
        values, seconds = (np.concatenate(each) for each in zip(*parts, strict=True))
        most = float(values[seconds > 0].max(initial=0.0))
        found[name] = {**weighted_percentiles(values, seconds, scale=1.0), "max": most}
    return found


def _prefixes(fleet: Fleet) -> dict[str, Any]:
    """Shares of the prompts' tokens that were found in the cache; with tiers, where."""
    engines = fleet.prompt_engines
    pools = [engine.scheduling.pool for engine in engines]
    queried = max(1, sum(pool.num_queried_tokens for pool in pools))
    hits = sum(pool.num_hit_tokens for pool in pools)
    report: dict[str, Any] = {"prefix_cache_hit_rate": hits / queried}
    tiers = [(engine.runner.memory.tiers, engine.runner.shapes.page_size) for engine in engines]
    stats = [(each.stats, size) for each, size in tiers if each is not None]
    if stats:
        below = {name: sum(getattr(s, f"{name}_hits") * size for s, size in stats) for name in ("host", "disk")}
        device = hits - sum(below.values())
        report["tier_hit_rates"] = {name: n / queried for name, n in {"device": device, **below}.items()}
        moved = "pages_out", "pages_in", "swaps_out", "swaps_in", "seconds_out", "seconds_in"
        report["tier_moves"] = {name: sum(getattr(s, name) for s, _ in stats) for name in moved}
    return report


def _speculation(fleet: Fleet) -> dict[str, Any]:
    totals = [engine.engine.drafts for engine in fleet.engines if engine.runner.drafts is not None]
    if not totals:
        return {}
    times, drafted, right = (
        sum(getattr(one, name) for one in totals) for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return {"acceptance_rate": right / max(1, drafted), "mean_acceptance_length": 1 + right / max(1, times)}


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds."""
    if not seconds:
        return {"mean": None, **{f"p{p}": None for p in PERCENTILES}}
    values = 1e3 * np.percentile(seconds, PERCENTILES)
    return {
        "mean": 1e3 * float(np.mean(seconds)),
        **{f"p{p}": v for p, v in zip(PERCENTILES, values.tolist(), strict=True)},
    }


def weighted_percentiles(seconds: np.ndarray, weights: np.ndarray, *, scale: float = 1e3) -> dict[str, float | None]:
    """The least value that has so much of the weight at or below it, times `scale`: of seconds milliseconds."""
    total = float(weights.sum())
    if not total:
        return {"mean": None, **{f"p{p}": None for p in PERCENTILES}}
    order = np.argsort(seconds)
    below = np.cumsum(weights[order])
    at = np.searchsorted(below, total * np.array(PERCENTILES) / 100)
    values = scale * seconds[order][np.minimum(at, len(order) - 1)]
    mean = scale * float((seconds * weights).sum() / total)
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
    queue, running = report["queue"], report["running"]
    lines.append(
        f"at one engine {running['mean']:.1f} requests ran on average (at most {running['max']:.0f}) and "
        f"{queue['mean']:.1f} waited (p50 {queue['p50']:.0f}, p99 {queue['p99']:.0f}, at most {queue['max']:.0f})"
    )
    lines += _more(report)
    if "cost" in report:
        lines.append(
            f"{report['cost']:,.2f} in all, {report['cost_per_million_output_tokens']:,.3f} per million output tokens, "
            f"{report['cost_per_million_tokens']:,.3f} per million tokens of prompt and output"
        )
    return "\n".join(lines)


def _more(report: dict[str, Any]) -> list[str]:
    """Of what only some simulations have."""
    lines = []
    if "tier_hit_rates" in report:
        rates = ", ".join(f"{name} {rate:.1%}" for name, rate in report["tier_hit_rates"].items())
        lines.append(f"found in the cache by tier: {rates}; {report['tier_moves']['pages_in']:,} pages came up again")
    if "acceptance_rate" in report:
        lines.append(
            f"{report['acceptance_rate']:.1%} of the drafted tokens were right, {report['mean_acceptance_length']:.2f} "
            "tokens came of a request's iteration with drafts"
        )
    if "transfers" in report:
        lines.append(
            f"{report['transfers']:,} hand-overs moved {report['transferred_bytes'] / 1e9:,.1f} GB; requests waited "
            f"{report['transfer_exposed_s']:.1f} s for them in all"
        )
    if "switches" in report:
        lines.append(f"{report['switches']:,} switches of models took {report['switching_s']:.1f} s")
    return lines


def _slo(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {limit:g} ms" for name, limit in report["slo"].items()) or "none"
