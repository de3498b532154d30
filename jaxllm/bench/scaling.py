"""How cost grows: TTFT, TPOT, decode rate and memory over context and batch, of an engine here or of servers.

A point is a batch of requests of one length that arrive together. What is decoded is measured while nobody's prompt is
computed, so the lines are those of decoding alone. Any OpenAI-compatible server can stand beside ours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.bench.decode_phase import decode_phase
from jaxllm.bench.sse_client import HttpError, Target

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.bench.workload import Planned

Run = Callable[["Sequence[Planned]"], list[list[float]]]  # requests -> when each of their tokens came, in seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `jaxllm bench scaling`, beside those of the engine."""
    parser.add_argument("--context", default="512,1024,2048", metavar="TOKENS[,TOKENS...]", help="lengths of prompts")
    parser.add_argument("--batch-size", default="1,8", metavar="N[,N...]", help="requests that arrive together")
    parser.add_argument("--output-len", type=int, default=32, help="tokens generated per prompt")
    parser.add_argument("--num-iters", type=int, default=3, help="repeats of each point; the median is reported")
    parser.add_argument(
        "--base-url",
        action="append",
        default=[],
        metavar="URL",
        help="measure the server there, not an engine here; several are measured one after the other",
    )
    parser.add_argument("--api-key", help="of those servers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="TTFT, TPOT and memory over context")


def run(args: argparse.Namespace, load: Callable[[], LLM]) -> int:
    """Measure and print; `load` gives the engine where no server is named."""
    contexts, batches = _sizes(args.context, "--context"), _sizes(args.batch_size, "--batch-size")
    for name in ("output_len", "num_iters"):
        if getattr(args, name) < (2 if name == "output_len" else 1):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; raise it")
    if args.plot:
        from jaxllm.roofline.plot import check_plotting

        check_plotting()
    sources = [_server(url, args.api_key) for url in args.base_url] or [
        _engine(args, load, max(contexts), max(batches))
    ]
    points = [
        {"source": name, **_point(run_batch, vocab, context, batch, args), "memory_bytes": memory()}
        for name, vocab, run_batch, memory in sources
        for batch in batches
        for context in contexts
    ]
    if args.plot:
        plot(points, args.plot)
    print(json.dumps({"points": points}) if args.json else format_report(points))
    return 0


def _sizes(text: str, flag: str) -> list[int]:
    sizes = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if not all(sizes):
        raise ValueError(f"{flag} is {text!r}; it must be whole numbers of at least 1, apart by commas")
    return sizes


def _engine(
    args: argparse.Namespace, load: Callable[[], LLM], context: int, batch: int
) -> tuple[str, int, Run, Callable[[], int | None]]:
    from jaxllm.bench.latency import arrivals
    from jaxllm.bench.throughput import peak_memory_bytes

    llm = load()
    shapes = llm.engine.runner.shapes
    if context + args.output_len > shapes.max_model_len:
        raise ValueError(
            f"--context {context} and --output-len {args.output_len} exceed max_model_len={shapes.max_model_len}; "
            "raise --max-model-len and --kv-cache-memory-bytes, or lower them"
        )
    if batch > shapes.max_num_seqs:
        raise ValueError(f"--batch-size {batch} exceeds max_num_seqs={shapes.max_num_seqs}; raise --max-num-seqs")
    llm.engine.runner.warm_up(sampling=False)
    return llm.config.model, llm.model_config.vocab_size, lambda requests: arrivals(llm, requests), peak_memory_bytes


def _server(url: str, key: str | None) -> tuple[str, int, Run, Callable[[], int | None]]:
    from jaxllm.bench.serve import send_all

    target = Target(url, key)
    try:
        card = asyncio.run(target.get("/v1/models"))["data"][0]
    except (OSError, HttpError) as error:
        raise ValueError(f"cannot talk to {url}: {error}") from None

    def run_batch(requests: Sequence[Planned]) -> list[list[float]]:
        outcomes, _ = asyncio.run(send_all(target, card["id"], requests, None))
        if failed := next((outcome.error for outcome in outcomes if outcome.error), None):
            raise ValueError(f"{url} failed at {len(requests)} prompts of {len(requests[0].prompt)} tokens: {failed}")
        return [outcome.arrivals for outcome in outcomes]

    return url, card.get("vocab_size", 1000), run_batch, lambda: asyncio.run(_resident_bytes(target))


async def _resident_bytes(target: Target) -> int | None:
    """Memory of the process that answers, where its metrics tell it; None elsewhere."""
    try:
        lines = (await target.text("/metrics")).splitlines()
    except (OSError, HttpError):
        return None
    values = [line.split()[-1] for line in lines if line.startswith("process_resident_memory_bytes")]
    return int(float(values[0])) if values else None


def _point(run_batch: Run, vocab_size: int, context: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    from jaxllm.bench.workload import random_prompts

    print(f"bench scaling: context {context}, batch {batch}", file=sys.stderr, flush=True)
    ttft, tpot = [], []
    for number in range(args.num_iters + 1):  # the first is not counted
        seed = hash((context, batch, number)) & 0x7FFFFFFF  # a repeated prompt would come out of the prefix cache
        streams = run_batch(random_prompts(batch, context, args.output_len, vocab_size, seed))
        if number:
            ttft += [times[0] for times in streams]
            tpot += [seconds] if (seconds := decode_phase(streams)) is not None else []
    seconds = statistics.median(tpot) if tpot else math.nan
    return {
        "context": context,
        "batch": batch,
        "ttft_ms": 1e3 * statistics.median(ttft),
        "tpot_ms": 1e3 * seconds if tpot else None,
        "decode_tokens_per_s": batch / seconds if tpot else None,
    }


def format_report(points: Sequence[dict[str, Any]]) -> str:
    """A table, a line for each point."""

    def shown(value: float | None, scale: float = 1.0) -> str:
        return f"{value * scale:>12.1f}" if value is not None else f"{'-':>12}"

    lines = [f"{'context':>8} {'batch':>6} {'TTFT ms':>12} {'TPOT ms':>12} {'tokens/s':>12} {'memory MiB':>12}  source"]
    for p in points:
        values = shown(p["ttft_ms"]), shown(p["tpot_ms"]), shown(p["decode_tokens_per_s"])
        memory = shown(p["memory_bytes"], 2**-20)
        lines.append(f"{p['context']:>8} {p['batch']:>6} {' '.join(values)} {memory}  {p['source']}")
    return "\n".join(lines)


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Three pictures over context, a line for each source and batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    panels = (("ttft_ms", "TTFT, ms", 1.0), ("tpot_ms", "TPOT, ms", 1.0), ("memory_bytes", "memory, MiB", 2**-20))
    lines = list(dict.fromkeys((p["source"], p["batch"]) for p in points))
    for axes, (name, title, scale) in zip(figure.subplots(1, 3), panels, strict=True):
        for source, batch in lines:
            own = [p for p in points if (p["source"], p["batch"]) == (source, batch)]
            values = [math.nan if p[name] is None else p[name] * scale for p in own]
            axes.plot([p["context"] for p in own], values, marker="o", label=f"{source}, batch {batch}")
        axes.set(title=title, xlabel="tokens of context", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ValueError(f"cannot write --plot {path}: {error.strerror}") from None
