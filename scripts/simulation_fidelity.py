"""Is the simulator right about this machine? The same arrivals, simulated and served, side by side.

    jaxllm bench calibrate --model FOLDER --out profile.json
    python scripts/simulation_fidelity.py --model FOLDER --profile profile.json --traces TRACES

Three replays: Azure's conversations scaled to the model, ShareGPT's lengths at a rate, Mooncake's shared prefixes. The
engine is stepped in this process and hears of each request at its time, as the simulated one does. Under each replay
stands what its iterations took beside what the profile says of the same work, by program and bucket: where a figure is
off, that is where to look. Run it on a machine that does nothing else: what others take shows as an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.bench.calibrate import Measured, Recorder
from jaxllm.bench.workload import TRACE_BLOCK
from jaxllm.engine.engine import Engine
from jaxllm.roofline.profile import Profile
from jaxllm.simulation.arrivals import Arrival
from jaxllm.simulation.config import SimulationConfig
from jaxllm.simulation.fleet import simulate
from jaxllm.simulation.outcomes import Gaps, Outcome
from jaxllm.simulation.report import percentiles, weighted_percentiles
from jaxllm.simulation.run import Setup, make_arrivals, make_fleet, set_up

TOLERANCES = {
    "output_tokens_per_s": 0.10,
    "ttft p50": 0.15,
    "itl p50": 0.15,
    "ttft p99": 0.30,
    "itl p99": 0.30,
    "prefix_hit_tokens": 0.0,
    "iterations": 0.02,
}


@dataclass
class RealClock:
    """Seconds since the replay began; tokens that are read together came together."""

    started: float
    widest: float = 0.0

    @property
    def now(self) -> float:
        return time.perf_counter() - self.started

    first = now


def replays(args: argparse.Namespace) -> dict[str, SimulationConfig]:
    """What is replayed."""
    common = {"chip": str(args.profile), "scale_lengths": True, "num_prompts": args.num_prompts}
    files = {
        "azure": ("azure_llm_2023_conv.csv", 2.0),
        "sharegpt": ("sharegpt_lengths.csv", 0.6),
        "mooncake": ("mooncake_conversation.jsonl", 2.0),
    }
    return {
        name: SimulationConfig(trace=str(args.traces / file), request_rate=rate * args.load, **common)
        for name, (file, rate) in files.items()
    }


def real_prompt(arrival: Arrival, vocab_size: int) -> list[int]:
    """Tokens of the vocabulary, equal where the arrival's blocks are."""
    parts = [np.random.default_rng((1, block)).integers(0, vocab_size, TRACE_BLOCK) for block in arrival.blocks]
    rest = np.random.default_rng((2, arrival.number)).integers(0, vocab_size, arrival.input_len)
    return np.concatenate([*parts, rest])[: arrival.input_len].tolist()


def serve(llm: LLM, arrivals: Sequence[Arrival]) -> tuple[dict[str, Any], list[Measured]]:
    """The arrivals through the real engine, in real time; with every iteration's."""
    recorder, vocab = Recorder(llm.engine.runner), llm.model_config.vocab_size
    built = llm.engine
    engine = Engine(recorder, memory=built.memory, scheduling=built.scheduler, accounting=built.accounting)
    pending = [(arrival, real_prompt(arrival, vocab)) for arrival in reversed(arrivals)]
    before = engine.accounting.totals.num_iterations, engine.pool.num_hit_tokens
    clock, gaps, outcomes = RealClock(time.perf_counter()), Gaps(), []
    while pending or engine.has_work:
        while pending and pending[-1][0].at <= clock.now:
            arrival, prompt = pending.pop()
            outcome = Outcome(arrival.at, arrival.input_len, arrival.output_len, clock, gaps)
            params = SamplingParams(temperature=0.0, max_tokens=arrival.output_len, ignore_eos=True)
            engine.add_request(prompt, params, streamed=True, listener=outcome)
            outcomes.append(outcome)
        if engine.has_work:
            engine.step()
        elif pending:
            time.sleep(max(0.0, min(0.001, pending[-1][0].at - clock.now)))
    iterations = engine.accounting.totals.num_iterations - before[0]
    return figures(outcomes, gaps, iterations, engine.pool.num_hit_tokens - before[1]), recorder.measured


def simulated(setup: Setup, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """The same on paper."""
    fleet = make_fleet(setup)
    for paper in fleet.engines:
        paper.engine.pace.target = None  # chunks of all sizes are compared
    results = simulate(fleet, arrivals)
    (engine,) = fleet.engines
    hits = engine.scheduling.pool.num_hit_tokens
    return figures(results.outcomes, results.gaps, engine.runner.num_iterations, hits)


def figures(outcomes: Sequence[Outcome], gaps: Gaps, iterations: int, hits: int) -> dict[str, Any]:
    """What is compared."""
    ttft = percentiles([outcome.ttft for outcome in outcomes])
    itl = weighted_percentiles(*gaps.weighted())
    duration = max(outcome.finished for outcome in outcomes) - outcomes[0].at
    return {
        "output_tokens_per_s": sum(outcome.num_tokens for outcome in outcomes) / duration,
        "ttft p50": ttft["p50"],
        "ttft p99": ttft["p99"],
        "itl p50": itl["p50"],
        "itl p99": itl["p99"],
        "prefix_hit_tokens": hits,
        "iterations": iterations,
    }


def by_program(profile: Profile, measured: Sequence[Measured]) -> Iterator[str]:
    """A line for each program and bucket: medians, and the ratio of sums, which counts where it matters."""
    groups: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    for one in measured:
        groups[one.work.program, one.bucket].append(one)
    for (program, bucket), group in sorted(groups.items()):
        real = np.array([one.seconds for one in group])
        paper = np.array([profile.seconds(one.work) for one in group])
        yield (
            f"    {program:<7}{bucket:>5}: {len(group):>5} iterations, {1e3 * np.median(paper):>7.1f} ms on paper, "
            f"{1e3 * np.median(real):>7.1f} measured (medians {np.median(paper / real) - 1:+.0%}, sums "
            f"{paper.sum() / real.sum() - 1:+.0%})"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the public traces")
    parser.add_argument("--num-prompts", type=int, default=60)
    parser.add_argument("--load", type=float, default=1.0, help="factor on the request rates")
    parser.add_argument("--only", choices=("azure", "sharegpt", "mooncake"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    llm, report, ok = None, {}, True
    for name, sim in replays(args).items():
        if args.only not in (None, name):
            continue
        setup = set_up({"model": args.model}, sim)
        llm = llm or LLM(**dataclasses.asdict(setup.config))
        llm.engine.runner.warm_up(sampling=False)
        llm.engine.pool.reset_prefix_cache()
        arrivals = list(make_arrivals(setup))
        paper, (real, measured) = simulated(setup, arrivals), serve(llm, arrivals)
        print(f"{name}: {len(arrivals)} requests", file=sys.stderr)
        report[name] = {key: {"simulated": paper[key], "measured": real[key]} for key in TOLERANCES}
        for key, tolerance in TOLERANCES.items():
            error = paper[key] / real[key] - 1 if real[key] else float(paper[key] != real[key])
            within = abs(error) <= tolerance
            ok = ok and within
            print(
                f"  {key:<20} simulated {paper[key]:>10,.1f} measured {real[key]:>10,.1f}  {error:+7.1%} "
                f"{'ok' if within else 'MORE THAN'} {tolerance:.0%}",
                file=sys.stderr,
            )
        assert setup.hardware.profile is not None
        print("\n".join(by_program(setup.hardware.profile, measured)), file=sys.stderr)
    if args.json:
        print(json.dumps(report))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
