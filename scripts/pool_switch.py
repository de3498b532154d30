"""What a switch between two models costs, against starting an engine: `python scripts/pool_switch.py A=MODEL B=MODEL`.

Prints one JSON object. Three parts: (1) how long an engine takes to start, with warm compilation caches; (2) a pool
whose budget holds one model, alternating: seconds per switch, and bytes per second of weights against `memcpy` between
buffers that have been touched; (3) three models (the first one twice) that decode at once in a budget for two: how much
of copying weights, and of copying KV pages to the host and back, is hidden behind other models' work. The name of a
preset runs with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxllm import LLM, Pool, SamplingParams
from jaxllm.families.presets import PRESETS

FIRST = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(100, 116))}


def table(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's settings."""
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True} if path in PRESETS else {}
    sizes = {"max_model_len": args.max_model_len, "kv_cache_memory_bytes": args.kv_cache_memory_bytes}
    return {"path": path, "max_num_seqs": 4, "quantization": args.quantization, **sizes, **dummy}


def start_seconds(settings: dict[str, Any], warm_up: bool) -> float:
    """From nothing to the first token, in a process that has JAX loaded and programs in its caches."""
    settings = {name: value for name, value in settings.items() if name != "path"} | {"model": settings["path"]}
    started = time.perf_counter()
    llm = LLM(use_tqdm=False, **settings)
    if warm_up:
        llm.engine.runner.warm_up()
    llm.generate(PROMPT, FIRST, use_tqdm=False)
    return time.perf_counter() - started


def memcpy_rate(num_bytes: int) -> float:
    """Bytes per second between two buffers that have been touched."""
    a, b = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(b, a)
        seconds.append(time.perf_counter() - started)
    return num_bytes / min(seconds)


def alternate(models: dict[str, Any], budget: int, rounds: int) -> dict[str, Any]:
    """One model on the device at a time."""
    with Pool(models, device_memory_bytes=budget, policy="request") as pool:
        for name in [*models] * 2:  # the device's memory is touched
            pool.generate(name, PROMPT, FIRST)
        before = len(pool.residents.switches)
        for _ in range(rounds):
            for name in models:
                pool.generate(name, PROMPT, FIRST)
        switches = [one for one in list(pool.residents.switches)[before:] if one.num_bytes]
    result = {}
    for name in models:
        mine = [one for one in switches if one.model == name]
        rate = statistics.median(one.num_bytes / one.copy_seconds for one in mine)
        seconds = statistics.median(one.seconds for one in mine)
        result[name] = {"switch_s": seconds, "weight_bytes": mine[0].num_bytes, "copy_bytes_per_s": rate}
    return result


def hidden(models: dict[str, Any], budget: int, max_tokens: int) -> dict[str, Any]:
    """All models decode at once."""
    long = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    with Pool(models, device_memory_bytes=budget) as pool, ThreadPoolExecutor(len(models)) as threads:
        list(threads.map(lambda name: pool.generate(name, PROMPT, FIRST), models))
        totals = pool.residents.totals
        before = dataclasses.replace(totals)
        started = time.perf_counter()
        list(threads.map(lambda name: pool.generate(name, PROMPT, long), models))
        spent = {f.name: getattr(totals, f.name) - getattr(before, f.name) for f in dataclasses.fields(totals)}
        pairs = {"weights": ("copy_seconds", "weight_wait_seconds"), "kv": ("cache_copy_seconds", "cache_wait_seconds")}
        shares = {part: 1 - spent[wait] / spent[copy] for part, (copy, wait) in pairs.items() if spent[copy]}
        return {"wall_s": time.perf_counter() - started, "hidden_share": shares} | spent


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, metavar="NAME=MODEL")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=64 << 20)
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=400)
    args = parser.parse_args()
    models = {name: table(path, args) for name, _, path in (pair.partition("=") for pair in args.models)}
    sizes = {}
    with Pool(models) as pool:  # also fills the compilation caches
        for name in models:
            pool.generate(name, PROMPT, FIRST)
            sizes[name] = pool.model(name).residence.sizes  # type: ignore[union-attr]
    whole = {name: size.weights + size.cache for name, size in sizes.items()}
    largest = max(size.weights for size in sizes.values())
    start = {name: min(start_seconds(table, False) for _ in range(2)) for name, table in models.items()}
    warm = {name: start_seconds(table, True) for name, table in models.items()}
    switching = alternate(models, max(whole.values()), args.rounds)
    first = next(iter(models))
    three = models | {f"{first}-again": models[first]}
    report = {
        "engine_start_s": start,
        "engine_start_and_warm_up_s": warm,
        "switch": switching,
        "saved": {name: 1 - switching[name]["switch_s"] / start[name] for name in models},
        "memcpy_bytes_per_s": memcpy_rate(largest),
        "hidden": hidden(three, 2 * max(whole.values()), args.max_tokens),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
