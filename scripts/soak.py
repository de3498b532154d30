"""Soak a running server: streaming clients of which a fifth hang up at random, for as long as asked.

    jaxllm serve --api-key k &
    python scripts/soak.py --base-url http://127.0.0.1:8000 --api-key k --seconds 180 --pid $!

Every stream that finishes must equal the answer to the same prompt when it was alone; with --pid the server's
memory is watched. In bfloat16 a near tie may fall differently in another batch size: serve with --dtype float32, or
tell it from a lost or doubled token by `wrong_length`. Prints one JSON object; exit code 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jaxllm.bench.sse_client import HttpError, Target
from jaxllm.bench.workload import random_prompts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, to watch its memory")
    args = parser.parse_args()
    report = soak(
        args.base_url,
        args.api_key,
        seconds=args.seconds,
        num_clients=args.clients,
        num_prompts=args.prompts,
        output_len=args.output_len,
        seed=args.seed,
        pid=args.pid,
    )
    print(json.dumps(report))
    return 1 if report["wrong"] or report["failed"] or report["kv_cache_usage_afterwards"] else 0


def soak(
    base_url: str,
    api_key: str | None,
    *,
    seconds: float,
    num_clients: int,
    num_prompts: int,
    output_len: int,
    seed: int,
    pid: int | None = None,
) -> dict[str, Any]:
    """Run it; see the module."""
    target = Target(base_url, api_key)
    return asyncio.run(_soak(target, seconds, num_clients, num_prompts, output_len, seed, pid))


async def _soak(
    target: Target, seconds: float, num_clients: int, num_prompts: int, output_len: int, seed: int, pid: int | None
) -> dict[str, Any]:
    vocab = (await target.get("/v1/models"))["data"][0]["vocab_size"]
    planned = random_prompts(num_prompts, 24, output_len, vocab, seed)
    bodies = [_body(p.prompt, output_len) for p in planned]
    expected = [await _alone(target, body) for body in bodies]
    counts: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    memory: list[int] = []
    watch = asyncio.ensure_future(_watch(pid, memory))
    rngs = [random.Random((seed, i).__hash__()) for i in range(num_clients)]
    await asyncio.gather(*(_client(target, bodies, expected, counts, deadline, rng) for rng in rngs))
    watch.cancel()
    await asyncio.sleep(1.0)
    stats = await target.get("/stats")
    report = {name: counts[name] for name in ("finished", "disconnected", "wrong", "wrong_length", "failed", "tokens")}
    report["kv_cache_usage_afterwards"] = stats["kv_cache_usage_perc"]
    report["requests_running_afterwards"] = stats["num_requests_running"]
    if memory:
        settled = memory[len(memory) // 6]  # after the first sixth everything has been touched once
        report |= {"rss_settled": settled, "rss_end": memory[-1], "rss_growth": memory[-1] / settled - 1}
    return report


def _body(prompt: list[int], output_len: int) -> dict[str, Any]:
    sampling = {"max_tokens": output_len, "temperature": 0, "ignore_eos": True}
    return {"prompt": prompt, "stream": True, "return_token_ids": True, **sampling}


async def _alone(target: Target, body: dict[str, Any]) -> list[int]:
    return [t async for _, e in target.events("/v1/completions", body) for c in e["choices"] for t in c["token_ids"]]


async def _client(
    target: Target, bodies: list, expected: list, counts: Counter[str], deadline: float, rng: random.Random
) -> None:
    while time.monotonic() < deadline:
        which = rng.randrange(len(bodies))
        leave_at = rng.randrange(len(expected[which])) if rng.random() < 0.2 else None
        tokens: list[int] = []
        try:
            events = target.events("/v1/completions", bodies[which])
            async for _, event in events:
                tokens += [t for choice in event["choices"] for t in choice["token_ids"]]
                if leave_at is not None and len(tokens) > leave_at:
                    break
            await events.aclose()
        except (OSError, HttpError, KeyError, asyncio.IncompleteReadError) as error:
            print(f"soak: {type(error).__name__}: {error}", file=sys.stderr)
            counts["failed"] += 1
            continue
        counts["tokens"] += len(tokens)
        counts["disconnected" if leave_at is not None else "finished"] += 1
        want = expected[which][: len(tokens)] if leave_at is not None else expected[which]
        counts["wrong"] += tokens != want
        counts["wrong_length"] += leave_at is None and len(tokens) != len(want)


async def _watch(pid: int | None, memory: list[int]) -> None:
    """Resident bytes, once a second."""
    while pid is not None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        memory.append(pages * 4096)
        await asyncio.sleep(1.0)


if __name__ == "__main__":
    sys.exit(main())
