"""`jaxllm simulate`: flags in; what a fleet would deliver, as text or one JSON object, and a plot, out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from jaxllm.commands.flags import add_fields
from jaxllm.config import EngineConfig
from jaxllm.config.fields import describe
from jaxllm.simulation.config import SimulationConfig

HELP = "What a model on a chip would deliver: the real scheduler on a modelled device."
_ENGINE = (
    "model max_model_len max_num_seqs max_num_batched_tokens page_size kv_cache_memory_bytes gpu_memory_utilization "
    "mesh sharding_rules max_decode_steps dtype kv_dtype quantization activation_dtype enable_prefix_caching "
    "host_kv_bytes disk_kv_bytes preemption_mode speculative_config seed"
).split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `SimulationConfig`, and the engine's that matter here."""
    group = parser.add_argument_group("simulation")
    fields = describe(SimulationConfig)
    add_fields(group, SimulationConfig, [name for name in fields if name != "models"])
    group.add_argument("--models", nargs="+", default=(), metavar="NAME=PATH", help=fields["models"].help)
    # What is not given is the engine's default, or what a profile was measured with.
    add_fields(parser.add_argument_group("engine"), EngineConfig, _ENGINE, **dict.fromkeys(_ENGINE))
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latencies, a sweep or a search")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Simulate and print. Raises ValueError with one line that says what to change."""
    fields = vars(args)
    args.models = tuple(args.models)
    sim = SimulationConfig(**{name: fields[name] for name in SimulationConfig.__dataclass_fields__})
    engine = {name: fields[name] for name in _ENGINE if fields[name] is not None}
    if args.plot is not None:
        from jaxllm.simulation.plot import check_plot

        check_plot(args.plot)
    from jaxllm.simulation.report import format_report
    from jaxllm.simulation.run import NUM_PROMPTS, run_once, set_up, sweep
    from jaxllm.simulation.search import search

    setup = set_up(engine, sim, progress=not args.json)
    total = sim.num_prompts or (None if sim.trace or sim.sweep or sim.search else NUM_PROMPTS)
    with _bar(total) as bar:
        report = (search if sim.search else sweep if sim.sweep else run_once)(setup, bar.update)
    if args.plot is not None:
        from jaxllm.simulation.plot import save_plot

        save_plot(report, args.plot)
    print(json.dumps(report) if args.json else _text(report, format_report(report)))
    return 0


def _text(report: dict[str, Any], lines: str) -> str:
    head = f"{report['model']} on {report['num_devices']} x {report['chip']}, mesh {report['mesh']}"
    if "search" in report:
        from jaxllm.simulation.search import format_search

        head = f"{report['model']} on {report['num_devices']} x {report['chip']}"
        return f"{head}\n{format_search(report)}\nthe first:\n{lines}"
    if "sweep" not in report:
        return f"{head}\n{lines}"
    rows = [
        f"  {one['request_rate']:>9.3f} requests/s: SLO met by {one['slo_attainment']:.1%}, TTFT p99 "
        f"{one['ttft_ms']['p99']:,.0f} ms, ITL p99 {one['itl_ms']['p99']:,.0f} ms"
        for one in report["sweep"]
    ]
    rate = report["highest_rate"]
    found = f"the SLO holds up to {rate:.3f} requests/s" if rate is not None else "the SLO holds at none of these rates"
    return "\n".join([head, *rows, found, lines])


def _bar(total: int | None):
    from tqdm import tqdm

    return tqdm(total=total, desc="simulate", unit="request", disable=not sys.stderr.isatty(), mininterval=0.5)
