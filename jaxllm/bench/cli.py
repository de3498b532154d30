"""`jaxllm bench throughput | latency | startup | load | serve`: flags in, one report out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.bench import serve as bench_serve
from jaxllm.flags import add_engine_flags, engine_arguments, load_llm

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.bench.workload import Planned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per bench."""
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    throughput = benches.add_parser("throughput", help="offline tokens per second")
    throughput.set_defaults(run=_throughput)
    throughput.add_argument("--num-prompts", type=int, default=32)
    throughput.add_argument("--input-len", type=int, default=16, help="tokens per prompt")
    throughput.add_argument("--output-len", type=int, default=64, help="tokens generated per prompt")
    throughput.add_argument("--trace", type=Path, metavar="FILE", help="take the lengths from a .csv or .jsonl instead")
    throughput.add_argument(
        "--scale-lengths", action="store_true", help="shrink the trace to --max-model-len; default: skip what is longer"
    )
    throughput.add_argument("--num-iters", type=int, default=3, help="repeats; the median is reported")

    latency = benches.add_parser("latency", help="one batch that arrives together: TTFT, TPOT, ITL, end to end")
    latency.set_defaults(run=_latency)
    latency.add_argument("--batch-size", type=int, default=8)
    latency.add_argument("--input-len", type=int, default=32)
    latency.add_argument("--output-len", type=int, default=128)
    latency.add_argument("--num-iters", type=int, default=30)

    startup = benches.add_parser("startup", help="seconds from a fresh process to ready and to the first token")
    startup.set_defaults(run=_startup)
    startup.add_argument("--num-iters", type=int, default=3)
    startup.add_argument("--cold", action="store_true", help="with an empty compilation cache")
    for bench_parser in (throughput, latency, startup):
        add_engine_flags(bench_parser)

    load = benches.add_parser("load", help="loading a folder of dummy weights: speed and peak memory")
    load.set_defaults(run=_load)
    load.add_argument("--gigabytes", type=float, default=2.0, help="size of the folder that is made for it")
    load.add_argument("--num-files", type=int, default=4)
    load.add_argument("--num-iters", type=int, default=3, help="repeats; the fastest is reported")
    load.add_argument("--mesh", default="tp=1", help="devices to load onto")
    load.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    serving = benches.add_parser("serve", help="latency and throughput of a running server under load")
    serving.set_defaults(run=bench_serve.run)
    bench_serve.add_arguments(serving)


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def _throughput(args: argparse.Namespace) -> int:
    from jaxllm.bench.throughput import format_report, measure_throughput

    _check_counts(args, "num_prompts", "input_len", "output_len", "num_iters")
    llm = load_llm(args)
    report = measure_throughput(llm, lambda seed: _workload(args, llm, seed), args.num_iters)
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def _workload(args: argparse.Namespace, llm: LLM, seed: int) -> list[Planned]:
    from jaxllm.bench.workload import random_prompts, read_trace

    vocab_size = llm.model_config.vocab_size
    if args.trace:
        longest = llm.engine.runner.shapes.max_model_len
        return read_trace(args.trace, args.num_prompts, vocab_size, longest, seed, scale=args.scale_lengths)
    return random_prompts(args.num_prompts, args.input_len, args.output_len, vocab_size, seed)


def _latency(args: argparse.Namespace) -> int:
    from jaxllm.bench.latency import measure_latency

    _check_counts(args, "batch_size", "input_len", "output_len", "num_iters")
    sizes = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "num_iters")}
    report = measure_latency(load_llm(args), **sizes)
    if args.json:
        print(json.dumps(report))
        return 0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        row = "  ".join(f"{p} {value:9.2f}" for p, value in report[name].items())
        print(f"{name:<8} {row}")
    return 0


def _startup(args: argparse.Namespace) -> int:
    from jaxllm.bench.startup import measure_startup

    _check_counts(args, "num_iters")
    report = measure_startup(engine_arguments(args), num_iters=args.num_iters, cold=args.cold)
    text = (
        f"ready after {report['ready_s']:.2f} s, first token after {report['first_token_s']:.2f} s, "
        f"{report['compilations']} programs"
    )
    print(json.dumps(report) if args.json else text)
    return 0


def _load(args: argparse.Namespace) -> int:
    from jaxllm.bench.load import format_report, measure_load

    for name in ("gigabytes", "num_files", "num_iters"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be above 0")
    report = measure_load(
        num_bytes=int(args.gigabytes * 1e9), num_files=args.num_files, mesh=args.mesh, num_iters=args.num_iters
    )
    print(json.dumps(report) if args.json else format_report(report))
    return 0
