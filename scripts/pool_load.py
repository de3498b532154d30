"""SLO attainment of a pool, switched between tokens against switched between requests.

`python scripts/pool_load.py` makes a pool of 8 copies of a tiny random model (or `--model PATH`) in a budget for 3,
sends 300 requests in bursts with a long tail of models, and looks for the highest rate at which 90% are in time. The
limits keep the proportions of Aegaeon's, TTFT 10 s to 100 ms per token, and are scaled to this machine: `tpot` is
`--tpot-steps` times what one request that is alone takes for a token (beside other models it takes up to half as much
more on a CPU), and `ttft` a hundred times that. A request is in time if its first token comes within `ttft` and its
last one by its deadline, `tpot` more for each token: the paper's deadlines. Rates rise or fall by the square root of
two until one holds and the next does not, or the policy's share of `--minutes` is over; while nobody has a request,
time is skipped. Prints one JSON object; beside that share of requests it has those of first tokens in time, of
requests with both limits met where the average counts from the first token, and of tokens in time, which count anew
after each late one and so hide waiting (see `jaxllm.pool.attainment`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import Pool, SamplingParams
from jaxllm.pool.attainment import tokens_in_time

Arrival = tuple[float, str, int, int]  # when, which model, tokens in, tokens out
_MOST_RUNS = 8
_REST = 0.3  # seconds, in which copies end
FIGURES = ("requests_in_time", "averages_in_time", "first_tokens_in_time")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to the first token, and between two on average."""

    ttft: float
    tpot: float


def arrivals(args: argparse.Namespace, rate: float) -> list[Arrival]:
    """Bursts (gaps of a gamma distribution with a coefficient of variation of 2), models by Zipf's law."""
    rng, now, out = random.Random(args.seed), 0.0, []
    weights = [1 / (i + 1) ** args.skew for i in range(args.num_models)]
    for _ in range(args.num_requests):
        now += rng.gammavariate(0.25, 4 / rate)
        model = rng.choices(range(args.num_models), weights)[0]
        lengths = (rng.lognormvariate(0, 0.6) for _ in range(2))
        size_in, size_out = (
            max(2, min(3 * mean, int(mean * x)))
            for mean, x in zip((args.input_len, args.output_len), lengths, strict=True)
        )
        out.append((now, f"m{model}", size_in, size_out))
    return out


async def send(pool: Pool, one: Arrival) -> tuple[float, list[float]]:
    """One request, now; its arrival and the times of its tokens."""
    _, name, size_in, size_out = one
    arrived, times = time.perf_counter(), []
    llm = await asyncio.wrap_future(pool.ready(name))
    params = SamplingParams(temperature=0.0, max_tokens=size_out, ignore_eos=True, detokenize=False)
    stream = await llm.open([{"prompt_token_ids": [(7 * i + size_in) % 200 + 3 for i in range(size_in)]}], params)
    try:
        async for news in stream:
            now = time.perf_counter()
            times += [now for _, delta in news for _ in delta.token_ids]
    finally:
        stream.cancel()
    return arrived, times


async def send_all(pool: Pool, plan: list[Arrival]) -> tuple[list[tuple[float, list[float]]], float]:
    """A plan's requests at their times, and the seconds between the first and the last event of the plan's clock.

    Where nothing is under way, all but `_REST` seconds of the wait for the next one are skipped: nobody is there to
    whom it matters, and low rates take no longer than their work.
    """
    tasks: list[asyncio.Task[tuple[float, list[float]]]] = []
    began, skipped = time.perf_counter(), 0.0
    for one in plan:
        while (left := one[0] - skipped - (time.perf_counter() - began)) > 0:
            running = [task for task in tasks if not task.done()]
            if running:
                await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            else:
                skipped += max(0.0, left - _REST)
                await asyncio.sleep(min(left, _REST))
        tasks.append(asyncio.create_task(send(pool, one)))
    results = await asyncio.gather(*tasks)
    return results, time.perf_counter() - began + skipped


def in_time(arrived: float, times: list[float], limits: Limits, *, on_average: bool = False) -> bool:
    """Whether a request met both; the time between tokens counts from the first one's deadline, or from its coming."""
    started = times[0] if on_average else arrived + limits.ttft
    return times[0] - arrived <= limits.ttft and times[-1] - started <= limits.tpot * (len(times) - 1)


async def load(pool: Pool, plan: list[Arrival], limits: Limits) -> dict[str, Any]:
    """All of a plan, measured."""
    switches = pool.residents.totals.count
    results, seconds = await send_all(pool, plan)
    total = sum(len(times) for _, times in results)
    met = sum(tokens_in_time(arrived, times, ttft=limits.ttft, tpot=limits.tpot) for arrived, times in results)
    first = sorted(times[0] - arrived for arrived, times in results)
    return {
        "requests_in_time": sum(in_time(*result, limits) for result in results) / len(results),
        "averages_in_time": sum(in_time(*result, limits, on_average=True) for result in results) / len(results),
        "first_tokens_in_time": sum(wait <= limits.ttft for wait in first) / len(first),
        "tokens_in_time": met / total,
        "tokens_per_s": total / seconds,
        "seconds": seconds,
        "ttft_p50_s": first[len(first) // 2],
        "ttft_p99_s": first[int(0.99 * (len(first) - 1))],
        "switches": pool.residents.totals.count - switches,
    }


def table(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's settings."""
    sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes")
    return {"path": path} | {name: getattr(args, name) for name in sizes}


async def _alone(pool: Pool, one: Arrival) -> float:
    arrived, times = await send(pool, one)
    return times[-1] - arrived


def calibrated(path: str, args: argparse.Namespace) -> tuple[Limits, float, int]:
    """The limits, seconds of an average request that is alone, and the bytes that a model takes."""
    with Pool({"m": table(path, args)}) as pool:
        sizes = pool.llm("m") and pool.model("m").residence.sizes  # type: ignore[union-attr]
        one = 0.0, "m", args.input_len, args.output_len
        seconds = [asyncio.run(_alone(pool, one)) for _ in range(6)]  # the first compiles
        step = min(seconds) / args.output_len
        tpot = args.tpot or args.tpot_steps * step
        return Limits(args.ttft or 100 * tpot, tpot), min(seconds), sizes.whole


def highest_rate(pool: Pool, limits: Limits, first: float, until: float, args: argparse.Namespace) -> dict[str, Any]:
    """The search for one policy."""
    runs: dict[int, dict[str, Any]] = {}
    i = 0
    while i not in runs and len(runs) < _MOST_RUNS and (not runs or time.monotonic() < until):
        rate = first * math.sqrt(2) ** i
        runs[i] = {"rate": rate} | asyncio.run(load(pool, arrivals(args, rate), limits))
        print(json.dumps({"policy": pool.config.policy} | runs[i]), file=sys.stderr, flush=True)
        i += 1 if runs[i]["requests_in_time"] >= 0.9 else -1
    report: dict[str, Any] = {"runs": list(runs.values())}
    for figure in FIGURES:
        held, missed = [], []
        for run in runs.values():
            (held if run[figure] >= 0.9 else missed).append(run["rate"])
        report[figure] = {"holds_at": max(held, default=None), "misses_at": min(missed, default=None)}
    return report


@contextlib.contextmanager
def model_of(args: argparse.Namespace) -> Iterator[str]:
    """The model's path."""
    if args.model:
        yield args.model
        return
    from tests.helpers.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"num_layers": args.layers, "hidden_size": 256, "intermediate_size": 1024}
        yield str(write_tiny_model(Path(folder) / "tiny", max_position_embeddings=args.max_model_len, **sizes))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, file or name; default: a tiny random one")
    for name, default in (
        ("num-models", 8),
        ("hold", 3),
        ("num-requests", 300),
        ("input-len", 64),
        ("output-len", 500),
        ("max-model-len", 2048),
        ("max-num-seqs", 8),
        ("max-num-batched-tokens", 128),
        ("kv-cache-memory-bytes", 48 << 20),
        ("layers", 8),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skew", type=float, default=1.0, help="of models' popularity; 0: all alike")
    parser.add_argument("--tpot-steps", type=float, default=7.5, help="see above")
    parser.add_argument("--ttft", type=float, help="seconds, in place of the scaled limit")
    parser.add_argument("--tpot", type=float, help="seconds, in place of the scaled limit")
    parser.add_argument(
        "--first-rate", type=float, help="requests per second; default: 0.4 of what one after another makes"
    )
    parser.add_argument("--policies", default="token,request")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it")
    args = parser.parse_args()
    ends, report = time.monotonic() + 60 * args.minutes, dict[str, Any]()
    with model_of(args) as path:
        limits, alone, size = calibrated(path, args)
        report |= {"ttft_s": limits.ttft, "tpot_s": limits.tpot, "alone_s": alone, "model_bytes": size}
        models = {f"m{i}": table(path, args) for i in range(args.num_models)}
        policies = args.policies.split(",")
        for i, policy in enumerate(policies):
            until = time.monotonic() + (ends - time.monotonic()) / (len(policies) - i)
            budget = args.hold * size + (1 << 20)
            with Pool(models, device_memory_bytes=budget, policy=policy, tpot=limits.tpot) as pool:
                for name in models:
                    pool.llm(name)
                practice = arrivals(args, 4 / alone)[: args.num_requests // 4]  # compiles, and touches memory
                asyncio.run(load(pool, practice, limits))
                report[policy] = highest_rate(pool, limits, args.first_rate or 0.4 / alone, until, args)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
