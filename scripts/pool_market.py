"""Aegaeon's market in the simulator: how many models 16 devices serve, switched between tokens or between requests.

`python scripts/pool_market.py --traces FOLDER` gives every model requests at the same rate, with ShareGPT's lengths
(`sharegpt_lengths.csv` of the folder) or log-normal ones, and prints for each policy and number of models the share of
requests that met both limits, of those whose first token was in time, of those that ended by their last token's
deadline (`ttft`, and `tpot` for each further token), and of tokens that came by theirs (`jaxllm.pool.attainment`);
then the most models with at least 90%, between two that were tried by a straight line. Each instance is one H100 that
prefills and decodes; weights come from host memory at 0.8 of PCIe 5. `--slower 4` divides the chip's rates, not the
link's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.families.presets import preset
from jaxllm.pool.policies import POLICIES
from jaxllm.roofline.chips import CHIPS, PCIE_GEN5
from jaxllm.simulation.arrivals import Arrival, at_rate, for_models, random_arrivals, trace_arrivals
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.fleet import simulate
from jaxllm.simulation.paper_engine import Hardware, PaperEngine, paper_engine
from jaxllm.simulation.pooled import Pooled

KINDS = ("gemma-7b", "llama-2-7b", "qwen3-8b", "llama-3.1-8b", "llama-2-13b")  # 7 to 13 billion parameters
LONGEST = 4096
SLO = {"ttft": 10.0, "tpot": 0.1}


def workload(args: argparse.Namespace, count: int) -> Iterator[Arrival]:
    """Lengths of so many requests."""
    if args.traces is not None:
        return trace_arrivals(args.traces / "sharegpt_lengths.csv", count, LONGEST, skip_longer=True)
    drawn = random_arrivals(count, args.input_len, args.output_len, spread=0.8)
    return (
        dataclasses.replace(one, input_len=min(one.input_len, 3000), output_len=max(2, min(one.output_len, 1000)))
        for one in drawn
    )


def served(policy: str, num_models: int, args: argparse.Namespace) -> dict[str, Any]:
    """One market."""
    kinds = {f"m{i}": preset(KINDS[i % len(KINDS)]) for i in range(num_models)}
    config = EngineConfig(
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=2048,
        max_model_len=LONGEST,
        kv_cache_memory_bytes=args.cache_bytes,
    )

    fast = CHIPS[args.chip]
    chip = dataclasses.replace(fast, flops=fast.flops / args.slower, bandwidth=fast.bandwidth / args.slower)

    def make_engine(name: str, clock: VirtualClock) -> PaperEngine:
        return paper_engine(config, kinds[name], Hardware(chip=chip), clock=clock)

    pool = Pooled(
        {name: 2.0 * cfg.num_parameters for name, cfg in kinds.items()},
        make_engine,
        num_instances=args.num_devices,
        policy=policy,
        bytes_per_s=0.8 * PCIE_GEN5,
    )
    rate = num_models * args.rate
    arrivals = list(for_models(at_rate(workload(args, int(rate * args.seconds)), rate), list(kinds)))
    started = time.perf_counter()
    results = simulate(pool, iter(arrivals))
    outcomes = results.outcomes
    return {
        "policy": policy,
        "models": num_models,
        "requests": len(outcomes),
        "requests_in_time": float(np.mean([outcome.meets(SLO) for outcome in outcomes])),
        "first_tokens_in_time": float(np.mean([outcome.ttft <= SLO["ttft"] for outcome in outcomes])),
        "ends_in_time": float(np.mean([o.e2e <= SLO["ttft"] + SLO["tpot"] * (o.num_tokens - 1) for o in outcomes])),
        "tokens_in_time": pool.attainment(**SLO),
        "median_request_s": float(np.median([outcome.e2e for outcome in outcomes])),
        "switches": sum(instance.num_switches for instance in pool.instances),
        "switching_share": sum(i.switching_s for i in pool.instances) / sum(i.clock.now for i in pool.instances),
        "mean_input": float(np.mean([one.input_len for one in arrivals])),
        "mean_output": float(np.mean([one.output_len for one in arrivals])),
        "computed_in_s": time.perf_counter() - started,
    }


def most_models(rows: Sequence[dict[str, Any]], figure: str) -> float:
    """Where a figure falls below 90%, by a straight line between neighbours; the last number where it never does."""
    held = 0.0
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        if row[figure] < 0.9:
            return held
        held = float(row["models"])
        if after is not None and after[figure] < 0.9:
            part = (row[figure] - 0.9) / (row[figure] - after[figure])
            return held + part * (after["models"] - row["models"])
    return held


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--traces", type=Path, help="folder with sharegpt_lengths.csv; else log-normal lengths")
    parser.add_argument("--input-len", type=int, default=300, help="median, without --traces")
    parser.add_argument("--output-len", type=int, default=300, help="median, without --traces")
    parser.add_argument("--models", default="20,30,40,50,60,70,80")
    parser.add_argument("--rate", type=float, default=0.1, help="requests per second of each model")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals")
    parser.add_argument("--num-devices", type=int, default=16)
    parser.add_argument("--chip", default="h100")
    parser.add_argument("--slower", type=float, default=1.0, help="than the chip's peaks")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--cache-bytes", type=int, default=16 << 30)
    args = parser.parse_args()
    report: dict[str, Any] = {}
    for policy in POLICIES:
        rows = []
        for count in map(int, args.models.split(",")):
            rows.append(served(policy, count, args))
            print(json.dumps(rows[-1]), flush=True)
        for figure in ("requests_in_time", "first_tokens_in_time", "ends_in_time", "tokens_in_time"):
            report[f"{policy}: {figure}"] = round(most_models(rows, figure), 1)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
