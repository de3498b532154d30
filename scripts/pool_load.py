"""SLO attainment of a pool, switched between tokens against switched between requests.

`python scripts/pool_load.py --model PATH --num-models 8 --hold 3 --num-requests 300 --rates 1,2,4` makes a pool of
`num-models` copies of one model in a budget for `hold` of them, sends requests in bursts with a long tail of models,
and prints a JSON object: for each policy and rate the share of tokens that came by their deadlines (see
`jaxllm.pool.attainment`), and the highest rate with at least 90%.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from typing import Any

from jaxllm import Pool, SamplingParams
from jaxllm.families.presets import PRESETS
from jaxllm.pool.attainment import tokens_in_time

Arrival = tuple[float, str, int, int]  # when, which model, tokens in, tokens out


def arrivals(args: argparse.Namespace, rate: float) -> list[Arrival]:
    """Bursts (gaps of a gamma distribution with a coefficient of variation of 2), models by Zipf's law."""
    rng, now, out = random.Random(args.seed), 0.0, []
    weights = [1 / (i + 1) ** args.skew for i in range(args.num_models)]
    for _ in range(args.num_requests):
        now += rng.gammavariate(0.25, 4 / rate)
        model = rng.choices(range(args.num_models), weights)[0]
        lengths = (rng.lognormvariate(0, 0.6) for _ in range(2))
        size_in, size_out = (
            max(2, min(4 * mean, int(mean * x)))
            for mean, x in zip((args.input_len, args.output_len), lengths, strict=True)
        )
        out.append((now, f"m{model}", size_in, size_out))
    return out


async def send(pool: Pool, one: Arrival, started: float) -> tuple[float, list[float]]:
    """One request; its arrival and the times of its tokens."""
    when, name, size_in, size_out = one
    await asyncio.sleep(max(0.0, started + when - time.perf_counter()))
    llm = await asyncio.wrap_future(pool.ready(name))
    params = SamplingParams(temperature=0.0, max_tokens=size_out, ignore_eos=True)
    arrived, times = time.perf_counter(), []
    stream = await llm.open([{"prompt_token_ids": [(7 * i + size_in) % 200 + 3 for i in range(size_in)]}], params)
    try:
        async for news in stream:
            now = time.perf_counter()
            times += [now for _, delta in news for _ in delta.token_ids]
    finally:
        stream.cancel()
    return arrived, times


async def load(pool: Pool, plan: list[Arrival], args: argparse.Namespace) -> dict[str, Any]:
    """All of a plan, measured."""
    started = time.perf_counter()
    results = await asyncio.gather(*(send(pool, one, started) for one in plan))
    total = sum(len(times) for _, times in results)
    met = sum(tokens_in_time(arrived, times, ttft=args.ttft, tpot=args.tpot) for arrived, times in results)
    first = sorted(times[0] - arrived for arrived, times in results if times)
    return {
        "attainment": met / total,
        "tokens": total,
        "seconds": time.perf_counter() - started,
        "ttft_p50_s": first[len(first) // 2],
        "ttft_p99_s": first[int(0.99 * (len(first) - 1))],
    }


def measure(policy: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """A fresh pool under one load."""
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True} if args.model in PRESETS else {}
    table = {"path": args.model, "max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs, **dummy}
    table["kv_cache_memory_bytes"] = args.kv_cache_memory_bytes
    models = {f"m{i}": dict(table) for i in range(args.num_models)}
    with Pool({"m0": table}) as probe:
        probe.llm("m0")
        sizes = probe.model("m0").residence.sizes  # type: ignore[union-attr]
    budget = args.hold * (sizes.weights + sizes.cache) + (1 << 20)
    with Pool(models, device_memory_bytes=budget, policy=policy, tpot=args.tpot, warm_up=True) as pool:
        for name in models:  # everything is loaded, compiled and touched
            pool.generate(name, {"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=4, ignore_eos=True))
        before = pool.residents.totals.count
        result = asyncio.run(load(pool, arrivals(args, rate), args))
        return result | {"switches": pool.residents.totals.count - before}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    for name, default in (
        ("num-models", 8),
        ("hold", 3),
        ("num-requests", 300),
        ("input-len", 64),
        ("output-len", 32),
        ("max-model-len", 512),
        ("max-num-seqs", 8),
        ("kv-cache-memory-bytes", 64 << 20),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skew", type=float, default=1.0, help="of models' popularity; 0: all alike")
    parser.add_argument("--ttft", type=float, default=10.0, help="seconds")
    parser.add_argument("--tpot", type=float, default=0.1, help="seconds")
    parser.add_argument("--rates", default="1,2,4", help="requests per second, all models together")
    parser.add_argument("--policies", default="token,request")
    args = parser.parse_args()
    report: dict[str, Any] = {"slo": {"ttft_s": args.ttft, "tpot_s": args.tpot}, "results": []}
    for policy in args.policies.split(","):
        held = [0.0]
        for rate in map(float, args.rates.split(",")):
            result = measure(policy, rate, args)
            report["results"].append({"policy": policy, "rate": rate} | result)
            held += [rate] if result["attainment"] >= 0.9 else []
        report[f"rate_at_90_percent_{policy}"] = max(held)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
