"""Which deployment to take: meshes, replicas, splits into prefill and decode, and budgets for a number of chips.

Every candidate that can run is simulated on the same workload, and its highest rate within the SLO found; the best come
first. Candidates that cannot hold the model are left out. Of each kind (together, or prefill and decode apart) one that
does not hold at four fifths of the best rate so far is not followed further: its rate is given as below that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.simulation.config import SimulationConfig
from jaxllm.simulation.run import OnSent, Setup, at_rate_long_enough, bisect, make_arrivals, run_once, sweep

BUDGETS = (512, 2048)
_FIRST_RATE = 0.4  # per device
_STEP = 1.5
_WORTH = 0.8  # of the best rate
_BISECTIONS = 4
_HIGHEST = 300.0  # requests/s, where a search ends


def candidates(setup: Setup, budgets: Sequence[int] = BUDGETS) -> Iterator[tuple[Setup, dict[str, Any]]]:
    """Every way to use all devices, with what the report says of it."""
    count = setup.sim.num_devices or 1
    for budget in sorted({max(budget, setup.config.max_num_seqs) for budget in budgets}):
        config = dataclasses.replace(setup.config, max_num_batched_tokens=budget)
        for tp in _divisors(count):
            layout = {"mesh": f"tp={tp}", "replicas": count // tp, "max_num_batched_tokens": budget}
            sim = dataclasses.replace(setup.sim, search=False, replicas=count // tp)
            yield dataclasses.replace(setup, config=dataclasses.replace(config, mesh=f"tp={tp}"), sim=sim), layout
        for sim in _splits(setup.sim, count):
            layout = {name: getattr(sim, name) for name in _SPLIT} | {"max_num_batched_tokens": budget}
            yield dataclasses.replace(setup, config=config, sim=sim), layout


_SPLIT = ("prefill_mesh", "prefill_replicas", "decode_mesh", "decode_replicas")


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _splits(sim: SimulationConfig, count: int) -> Iterator[SimulationConfig]:
    """Prefill on a quarter, a half or three quarters of the devices, on engines of every size."""
    for part in sorted({count // 4, count // 2, 3 * count // 4} - {0, count}):
        for prefill_tp in (tp for tp in _divisors(part) if tp & (tp - 1) == 0):
            for decode_tp in (tp for tp in _divisors(count - part) if tp & (tp - 1) == 0):
                yield dataclasses.replace(
                    sim,
                    search=False,
                    prefill_mesh=f"tp={prefill_tp}",
                    prefill_replicas=part // prefill_tp,
                    decode_mesh=f"tp={decode_tp}",
                    decode_replicas=(count - part) // decode_tp,
                )


def search(setup: Setup, on_sent: OnSent = lambda _: None) -> dict[str, Any]:
    """The report of the best, with all that ran under `search`, best first.

    By the highest rate within the SLO; where `request_rate` is set, by goodput at it.

    Raises ValueError where nothing can run.
    """
    sim = setup.sim
    if not sim.limits:
        raise ValueError("a search ranks by goodput within an SLO; set --slo")
    found, best, problem = [], dict[bool, float](), "no candidates"
    for candidate, layout in candidates(_whole_workload(setup)):
        kind = "mesh" in layout
        try:
            report = _measure(candidate, on_sent, best.get(kind, 0.0))
        except ValueError as error:
            problem = str(error)
            continue
        best[kind] = max(best.get(kind, 0.0), report.get("highest_rate") or 0.0)
        found.append((_score(report), layout, report))
    if not found:
        raise ValueError(f"nothing that {sim.num_devices} devices can be arranged to runs this: {problem}")
    found.sort(key=lambda one: -one[0])
    rows = [
        {
            **layout,
            "goodput_per_device": score,
            **({"at_most": True} if "at_most" in report else {}),
            "requests": report["requests"],
            "slo_attainment": report["slo_attainment"],
            "ttft_ms": report["ttft_ms"],
            "tpot_ms": report["tpot_ms"],
            "itl_ms": report["itl_ms"],
        }
        for score, layout, report in found
    ]
    first = {key: value for key, value in found[0][2].items() if key != "sweep"}
    return {**first, "search": rows}


def _whole_workload(setup: Setup) -> Setup:
    """With room for the longest request of the whole trace asked of every candidate.

    Else one that holds short requests only would leave the long ones out (`skip_longer`), or shrink all of them
    (`scale_lengths`), and win.
    """
    sim = setup.sim
    if not (sim.skip_longer or sim.scale_lengths) or sim.trace is None or setup.config.max_model_len is not None:
        return setup
    whole = dataclasses.replace(setup, sim=dataclasses.replace(sim, num_prompts=None))  # a run may take more of it
    longest = max((arrival.input_len + arrival.output_len for arrival in make_arrivals(whole)), default=1)
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, max_model_len=longest))


def _measure(candidate: Setup, on_sent: OnSent, best: float) -> dict[str, Any]:
    sim = candidate.sim
    if sim.request_rate is not None:
        return run_once(candidate, on_sent)
    if sim.sweep is not None:
        return sweep(candidate, on_sent)
    return highest(candidate, on_sent, best=best)


def highest(candidate: Setup, on_sent: OnSent = lambda _: None, *, best: float = 0.0) -> dict[str, Any]:
    """The report at the highest rate within the SLO, with that as `highest_rate`.

    By steps of half as much again, then by bisection. A run has as many requests as `num_requests` says, and ends as
    soon as too many of them have missed the SLO.

    Args:
        candidate: what is simulated.
        on_sent: see `simulate`.
        best: where it does not hold at `_WORTH` of this rate, the report is of that and has `at_most`.
    """
    sim, held = candidate.sim, dict[float, dict[str, Any]]()
    report: dict[str, Any] = {}

    def holds(rate: float) -> bool:
        nonlocal report
        one = at_rate_long_enough(candidate, rate)
        report = run_once(one, on_sent, most_missed=(1 - sim.attainment) * (one.sim.num_prompts or 0))
        if report["slo_attainment"] < sim.attainment or "gave_up" in report:
            return False
        held[rate] = report
        return True

    first = rate = _WORTH * best or _FIRST_RATE * (sim.num_devices or 1)
    high = math.inf
    while not holds(rate):
        if best:
            return {**report, "highest_rate": rate, "at_most": True}
        if rate < first / 64:
            return {**report, "highest_rate": None}
        high, rate = rate, rate / _STEP
    while math.isinf(high) and rate < _HIGHEST:
        rate, high = (_STEP * rate, high) if holds(_STEP * rate) else (rate, _STEP * rate)
    if high < math.inf:
        rate = bisect(holds, rate, high, steps=_BISECTIONS)
    return {**held[rate], "highest_rate": rate}


def _score(report: dict[str, Any]) -> float:
    """Requests per second and device within the SLO."""
    if "highest_rate" in report:
        return (report["highest_rate"] or 0.0) / report["num_devices"]
    return report["goodput_per_device"]


def format_search(report: dict[str, Any], limit: int = 12) -> str:
    """The best for a person."""
    lines = [f"{'requests/s per device':>21}  {'SLO met':>8} {'TTFT p99':>9} {'TPOT p99':>9}  deployment"]
    for row in report["search"][:limit]:
        rate = f"{'below ' if row.get('at_most') else ''}{row['goodput_per_device']:.3f}"
        lines.append(
            f"{rate:>21}  {row['slo_attainment']:>8.1%} {row['ttft_ms']['p99'] or 0:>9,.0f} "
            f"{row['tpot_ms']['p99'] or 0:>9,.1f}  {name_of(row)}"
        )
    return "\n".join(lines)


def name_of(row: dict[str, Any]) -> str:
    """A deployment in a few words."""
    budget = f"chunks of {row['max_num_batched_tokens']}"
    if "mesh" in row:
        return f"{row['replicas']} x {row['mesh']}, {budget}"
    prefill, decode = (f"{row[f'{pool}_replicas']} x {row[f'{pool}_mesh']}" for pool in ("prefill", "decode"))
    return f"{prefill} -> {decode}, {budget}"
