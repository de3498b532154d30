"""Load on a running server: requests at a rate or from a trace -> latencies, throughput and goodput.

TTFT is send to first token, TPOT `(latency - TTFT) / (tokens - 1)`, ITL the gap between tokens as they arrive,
goodput the requests per second that met every objective. Works against any OpenAI-compatible server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.bench.sse_client import HttpError, Target

if TYPE_CHECKING:
    from jaxllm.bench.workload import Planned

METRICS = ("ttft", "tpot", "itl", "e2e")


@dataclass(slots=True)
class Outcome:
    """What became of one request: seconds from its sending, and tokens."""

    num_prompt: int
    arrivals: list[float] = field(default_factory=list)
    latency: float = 0.0
    error: str | None = None

    @property
    def values(self) -> dict[str, float]:
        """Milliseconds, by metric (ITL aside, of which there are many)."""
        first, count = self.arrivals[0], len(self.arrivals)
        tpot = (self.latency - first) / (count - 1) if count > 1 else math.nan
        return {"ttft": first * 1e3, "tpot": tpot * 1e3, "e2e": self.latency * 1e3}

    @property
    def gaps(self) -> list[float]:
        """ITL in milliseconds."""
        return [(b - a) * 1e3 for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `jaxllm bench serve`."""
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--model", help="name to ask for; default: the first the server lists")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=16, help="tokens per prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens generated per prompt")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="lengths and arrival times from a .csv or .jsonl")
    parser.add_argument(
        "--scale-lengths",
        action="store_true",
        help="shrink the trace to the server's context; default: skip longer ones",
    )
    parser.add_argument(
        "--request-rate",
        default=None,
        metavar="R[,R...]",
        help="requests per second, or inf; several make a sweep; default: the trace's own times, else inf",
    )
    parser.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, above it more even")
    parser.add_argument("--time-scale", type=float, default=1.0, help="stretches the trace's own times")
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at most")
    parser.add_argument(
        "--background-clients", type=int, default=0, metavar="N", help="clients that send long prompts without pause"
    )
    parser.add_argument("--background-len", type=int, default=4096, metavar="TOKENS", help="of each of those prompts")
    parser.add_argument("--percentile-metrics", default="ttft,tpot,itl", metavar="M[,M...]")
    parser.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="for example ttft:200 tpot:50")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="TTFT and ITL over load")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 when no request succeeded."""
    _check(args)
    objectives = _objectives(args.goodput)
    try:
        reports = asyncio.run(_measure(args, objectives))
    except (OSError, HttpError) as error:
        raise ValueError(f"cannot talk to {args.base_url}: {error}") from None
    if args.plot:
        plot(reports, args.plot)
    result = reports[0] if len(reports) == 1 else {"sweep": reports}
    print(json.dumps(result) if args.json else "\n\n".join(format_report(report) for report in reports))
    return 0 if any(report["completed"] for report in reports) else 1


def _check(args: argparse.Namespace) -> None:
    if args.background_clients < 0:
        raise ValueError(f"--background-clients is {args.background_clients}; it must be at least 0")
    at_least_one = ("num_prompts", "input_len", "output_len", "max_concurrency", "background_len")
    for name in (*at_least_one, "burstiness", "time_scale"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    for metric in args.percentile_metrics.split(","):
        if metric not in METRICS:
            raise ValueError(f"--percentile-metrics has {metric!r}; known ones are {', '.join(METRICS)}")
    if args.plot and args.plot.suffix != ".png":
        raise ValueError(f"--plot is {args.plot}; it must end in .png")


def _rates(text: str | None) -> list[float | None]:
    if text is None:
        return [None]
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"--request-rate is {text!r}; it must be numbers above 0, or inf, apart by commas")
    return list(rates)


def _objectives(pairs: Sequence[str]) -> dict[str, float]:
    objectives = {}
    for pair in pairs:
        metric, _, limit = pair.partition(":")
        try:
            objectives[metric] = float(limit)
        except ValueError:
            metric = ""
        if metric not in ("ttft", "tpot", "e2e") or not objectives[metric] > 0:
            raise ValueError(f"--goodput has {pair!r}; it must look like ttft:200, with ttft, tpot or e2e")
    return objectives


async def _measure(args: argparse.Namespace, objectives: dict[str, float]) -> list[dict[str, Any]]:
    from jaxllm.bench.workload import at_rate, random_prompts, read_trace, stretched

    target = Target(args.base_url, args.api_key)
    rates = _rates(args.request_rate)
    card = (await target.get("/v1/models"))["data"][0]
    model, vocab = args.model or card["id"], card.get("vocab_size", 1000)
    reports = []
    for number, rate in enumerate(rates):
        seed = args.seed + number  # a repeated prompt would come out of the prefix cache
        if args.trace:
            longest = card.get("max_model_len", 2**31)
            planned = read_trace(args.trace, args.num_prompts, vocab, longest, seed, scale=args.scale_lengths)
        else:
            planned = random_prompts(args.num_prompts, args.input_len, args.output_len, vocab, seed)
        if rate is not None or not args.trace:
            planned = at_rate(planned, rate or math.inf, args.burstiness, seed)
        elif args.time_scale != 1.0:
            planned = stretched(planned, args.time_scale)
        before = await _device_work(target)
        with _background(target, model, args.background_clients, args.background_len, vocab):
            outcomes, elapsed = await send_all(target, model, planned, args.max_concurrency)
        report = summarise(outcomes, elapsed, args.percentile_metrics.split(","), objectives)
        if before and (after := await _device_work(target)):
            report["server_iteration_ms"] = 1e3 * (after[0] - before[0]) / max(1, after[1] - before[1])
        reports.append({"model": model, "request_rate": _json_rate(rate, args), **report})
    return reports


@contextlib.contextmanager
def _background(target: Target, model: str, num_clients: int, length: int, vocab: int) -> Iterator[None]:
    """Clients that send prompts nobody measures, each the next as soon as one token has come back."""

    async def client(number: int) -> None:
        for seed in itertools.count(number, num_clients):
            (request,) = random_prompts(1, length, 1, vocab, 10**6 + seed)
            if error := (await _send(target, model, request)).error:
                print(f"bench serve: a background request failed: {error}", file=sys.stderr)
                return

    from jaxllm.bench.workload import random_prompts

    tasks = [asyncio.ensure_future(client(number)) for number in range(num_clients)]
    yield
    for task in tasks:
        task.cancel()


async def _device_work(target: Target) -> tuple[float, int] | None:
    """Device seconds and iterations of the server so far; None where it does not tell."""
    try:
        stats = await target.get("/stats")
        return stats["device_seconds"], stats["iterations"]
    except (HttpError, KeyError, ValueError):
        return None


def _json_rate(rate: float | None, args: argparse.Namespace) -> float | str:
    if rate is None:
        return "trace" if args.trace else "inf"
    return "inf" if math.isinf(rate) else rate


async def send_all(
    target: Target, model: str, planned: Sequence[Planned], max_concurrency: int | None
) -> tuple[list[Outcome], float]:
    """Send every request at its time, or as soon as the concurrency limit allows; outcomes and seconds in all."""
    limit = asyncio.Semaphore(max_concurrency or len(planned))
    started = time.perf_counter()

    async def one(request: Planned) -> Outcome:
        await asyncio.sleep(max(0.0, request.at - (time.perf_counter() - started)))
        async with limit:
            return await _send(target, model, request)

    from tqdm import tqdm

    tasks = [asyncio.ensure_future(one(request)) for request in planned]
    with tqdm(total=len(tasks), desc="bench serve", unit="request", disable=not sys.stderr.isatty()) as bar:
        for task in tasks:
            task.add_done_callback(lambda _: bar.update(1))
        outcomes = list(await asyncio.gather(*tasks))
    return outcomes, time.perf_counter() - started


async def _send(target: Target, model: str, request: Planned) -> Outcome:
    outcome = Outcome(len(request.prompt))
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    started = time.perf_counter()
    try:
        async for at, event in target.events("/v1/completions", body):
            if "error" in event:
                outcome.error = str(event["error"].get("code") or event["error"]["message"])[:100]
                return outcome
            for choice in event["choices"]:
                # Other servers do not say how many tokens a chunk has: one, then.
                count = len(choice["token_ids"]) if choice.get("token_ids") is not None else int(bool(choice["text"]))
                outcome.arrivals += [at - started] * count
    except (OSError, HttpError, ValueError, asyncio.IncompleteReadError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:100]
    outcome.latency = time.perf_counter() - started
    if not outcome.arrivals and outcome.error is None:
        outcome.error = "no tokens"
    return outcome


def summarise(
    outcomes: Sequence[Outcome], elapsed: float, metrics: Sequence[str], objectives: dict[str, float]
) -> dict[str, Any]:
    """One report; see `conventions` for the words."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    num_output = sum(len(outcome.arrivals) for outcome in good)
    report: dict[str, Any] = {
        "num_prompts": len(outcomes),
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "duration_s": elapsed,
        "request_throughput": len(good) / elapsed,
        "prompt_tokens": sum(outcome.num_prompt for outcome in good),
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / elapsed,
    }
    for metric in metrics:
        report[f"{metric}_ms"] = percentiles(_samples(good, metric))
    if objectives:
        met = sum(all(not outcome.values[m] > limit for m, limit in objectives.items()) for outcome in good)
        report |= {"goodput": met / elapsed, "goodput_objectives_ms": objectives}
    return report


def _samples(good: Sequence[Outcome], metric: str) -> list[float]:
    if metric == "itl":
        return [gap for outcome in good for gap in outcome.gaps]
    return [value for outcome in good if not math.isnan(value := outcome.values[metric])]


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, 90th and 99th percentile."""
    if not samples:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    import numpy as np

    p50, p90, p99 = np.percentile(samples, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(samples)), "p50": p50, "p90": p90, "p99": p99}


def format_report(report: dict[str, Any]) -> str:
    """A few lines for a person."""
    lines = [
        f"rate {report['request_rate']}: {report['completed']} of {report['num_prompts']} requests in "
        f"{report['duration_s']:.1f} s, {report['output_tokens_per_s']:,.0f} output tokens/s"
    ]
    for metric in METRICS:
        if values := report.get(f"{metric}_ms"):
            known = {name: f"{value:.1f}" for name, value in values.items() if value is not None}
            lines.append(f"{metric:>5} ms  " + "  ".join(f"{name} {value}" for name, value in known.items()))
    if "server_iteration_ms" in report:
        lines.append(f"one iteration of the server took {report['server_iteration_ms']:.1f} ms on average")
    if "goodput" in report:
        lines.append(f"goodput {report['goodput']:.2f} requests/s within {report['goodput_objectives_ms']}")
    lines += [f"failed: {count} x {error}" for error, count in report["errors"].items()]
    return "\n".join(lines)


def plot(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """TTFT and ITL, median and 99th percentile, over the load that was served."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib; install it with: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    load = [report["request_throughput"] for report in reports]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric in zip(axes, ("ttft", "itl"), strict=True):
        for name in ("p50", "p99"):
            values = [(report.get(f"{metric}_ms") or {}).get(name) or math.nan for report in reports]
            axis.plot(load, values, marker="o", label=name)
        axis.set(
            title=f"{metric.upper()} of {reports[0]['model']}", xlabel="requests/s served", ylabel="ms", ylim=(0, None)
        )
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
