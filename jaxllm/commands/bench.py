"""`jaxllm bench throughput | latency | scaling | prefix | speculative | startup | ...`: flags in, report out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.bench import scaling as bench_scaling
from jaxllm.bench import serve as bench_serve
from jaxllm.commands.flags import add_engine_flags, engine_arguments, load_llm

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.bench.workload import Planned


_EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}'
HELP = "Measure throughput, latency or start-up."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per bench, each with its own `run`."""
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    throughput = benches.add_parser("throughput", help="offline tokens per second")
    throughput.set_defaults(run=_throughput)
    throughput.add_argument("--num-prompts", type=int, default=32)
    throughput.add_argument("--input-len", type=int, default=16, help="tokens per prompt")
    throughput.add_argument("--output-len", type=int, default=64, help="tokens generated per prompt")
    _add_trace_flags(throughput)
    throughput.add_argument("--num-iters", type=int, default=3, help="repeats; the median is reported")

    latency = benches.add_parser("latency", help="batches that arrive together: TTFT, TPOT, ITL, end to end")
    latency.set_defaults(run=_latency)
    latency.add_argument("--batch-size", type=int, default=8, help="requests that arrive together")
    latency.add_argument("--input-len", type=int, default=32, help="tokens per prompt")
    latency.add_argument("--output-len", type=int, default=128, help="tokens generated per prompt")
    _add_trace_flags(latency)
    latency.add_argument("--num-prompts", type=int, help="in all; default: one batch, with --trace 32")
    latency.add_argument("--num-iters", type=int, help="repeats; default 30, with --trace 1")

    prefix = benches.add_parser("prefix", help="a second batch whose prefixes were pushed off the device: TTFT")
    prefix.set_defaults(run=_prefix)
    prefix.add_argument("--num-prompts", type=int, default=4, help="that arrive together")
    prefix.add_argument("--input-len", type=int, default=1024, help="tokens per prompt")
    prefix.add_argument("--num-iters", type=int, default=3, help="repeats; the median is reported")
    prefix.add_argument(
        "--from-disk", action="store_true", help="measure the disk, not the host (needs --disk-kv-path)"
    )

    speculative = benches.add_parser(
        "speculative", help="speculative against plain decoding, on repetitive work and chat"
    )
    speculative.set_defaults(run=_speculative)
    speculative.add_argument("--output-len", type=int, default=128, help="tokens generated per prompt")
    speculative.add_argument("--batch-size", type=int, default=1, help="prompts that run together")
    speculative.add_argument("--num-iters", type=int, default=3, help="repeats; the median is reported")
    speculative.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")

    startup = benches.add_parser("startup", help="seconds from a fresh process to ready and to the first token")
    startup.set_defaults(run=_startup)
    startup.add_argument("--num-iters", type=int, default=3)
    startup.add_argument("--cold", action="store_true", help="with an empty compilation cache")

    scaling = benches.add_parser("scaling", help="TTFT, TPOT and memory over context and batch; of servers, too")
    scaling.set_defaults(run=lambda args: bench_scaling.run(args, lambda: load_llm(args)))
    bench_scaling.add_arguments(scaling)

    calibrate = benches.add_parser("calibrate", help="a profile of this device's iterations, for jaxllm simulate")
    calibrate.set_defaults(run=_calibrate)
    calibrate.add_argument("--out", type=Path, required=True, metavar="PROFILE.json", help="where it is written")
    calibrate.add_argument("--num-iters", type=int, default=2, help="rounds over the grid")
    for bench_parser in (throughput, latency, prefix, speculative, startup, scaling, calibrate):
        add_engine_flags(bench_parser)

    replay = benches.add_parser("replay", help="a trace through scheduler and page pool, without any model")
    replay.set_defaults(run=_replay)
    replay.add_argument(
        "--trace", type=Path, required=True, metavar="FILE", help="lengths and shared blocks, any times"
    )
    replay.add_argument("--num-requests", type=int, help="the first so many; default: all")
    replay.add_argument("--num-pages", type=int, default=1 << 20, help="size of the page pool")
    replay.add_argument("--page-size", type=int, default=512, help="tokens per page")
    replay.add_argument("--max-num-seqs", type=int, default=32, help="requests that run together")
    replay.add_argument("--max-num-batched-tokens", type=int, default=8192, help="tokens per iteration")
    replay.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    replay.add_argument("--json", action="store_true", help="print one JSON object on standard output")

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


def _add_trace_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, metavar="FILE", help="take the lengths from a .csv or .jsonl instead")
    parser.add_argument(
        "--scale-lengths", action="store_true", help="shrink the trace to --max-model-len; default: skip what is longer"
    )


def _check_counts(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def run(args: argparse.Namespace) -> int:
    """The bench that was chosen replaces this."""
    raise AssertionError("a bench has its own run")


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
    from jaxllm.bench.latency import format_report, measure_latency

    if args.num_prompts is None:
        args.num_prompts = 32 if args.trace else args.batch_size
    if args.num_iters is None:
        args.num_iters = 1 if args.trace else 30
    _check_counts(args, "batch_size", "num_prompts", "input_len", "output_len", "num_iters")
    llm = load_llm(args)
    report = measure_latency(
        llm, lambda seed: _workload(args, llm, seed), batch_size=args.batch_size, num_iters=args.num_iters
    )
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def _prefix(args: argparse.Namespace) -> int:
    from jaxllm.bench.prefix import format_report, measure_prefix

    _check_counts(args, "num_prompts", "input_len", "num_iters")
    if not args.host_kv_bytes:
        raise ValueError("this bench measures the host tier; set --host-kv-bytes")
    if args.from_disk and args.disk_kv_path is None:
        raise ValueError("--from-disk measures the disk tier; set --disk-kv-path and --disk-kv-bytes")
    sizes = {name: getattr(args, name) for name in ("num_prompts", "input_len", "num_iters", "from_disk")}
    report = measure_prefix(load_llm(args), **sizes)
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def _speculative(args: argparse.Namespace) -> int:
    from jaxllm import LLM
    from jaxllm.bench.speculative import format_report, measure_speculative

    _check_counts(args, "output_len", "batch_size", "num_iters")
    if args.speculative_config is None:
        raise ValueError(f"this bench compares with --speculative-config, for example '{_EXAMPLE}'")
    speculating = load_llm(args)
    arguments: dict[str, Any] = engine_arguments(args) | {"speculative_config": None}
    plain = LLM(**arguments)
    sizes = {name: getattr(args, name) for name in ("output_len", "batch_size", "num_iters", "temperature")}
    report = measure_speculative(plain, speculating, **sizes)
    print(json.dumps(report) if args.json else format_report(report))
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


def _calibrate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from jaxllm.bench.calibrate import as_json, calibrate, format_report

    _check_counts(args, "num_iters")
    if not args.out.parent.is_dir():
        raise ValueError(f"--out is {args.out}; there is no folder {args.out.parent}")
    llm = load_llm(args)
    with tqdm(desc="calibrate", unit="point", disable=not sys.stderr.isatty()) as bar:

        def on_point(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        profile = calibrate(llm, num_iters=args.num_iters, on_point=on_point)
    profile.save(args.out)
    print(json.dumps(as_json(profile)) if args.json else f"{format_report(profile)}\nwritten to {args.out}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from jaxllm.bench.replay import format_report, replay, trace_requests
    from jaxllm.scheduling.page_pool import PagePool
    from jaxllm.scheduling.scheduler import Scheduler

    _check_counts(args, "num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens")
    pool = PagePool(args.num_pages, args.page_size, enable_prefix_caching=args.enable_prefix_caching)
    scheduler = Scheduler(
        pool, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens, max_decode_steps=8
    )
    report = replay(trace_requests(args.trace, args.num_requests), scheduler)
    print(json.dumps(report) if args.json else format_report(report))
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
