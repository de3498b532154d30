"""`route`: vllm-router in front of two plain servers: what its policies leave cached, and one server killed."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from two_pools.requests import Body, answer, can_be_retried
from two_pools.servers import Server, router, running

_BLOCK_CHARS = 16  # stand for a block of 512 tokens of the trace
_AT_ONCE = 4
_OUTPUT_TOKENS = 4


def _conversations(args: argparse.Namespace) -> list[Body]:
    """The trace's prompts as texts that begin alike where theirs do, shorter in proportion."""
    rng, texts, made = random.Random(0), {}, []
    with open(args.trace) as file:
        rows = [json.loads(line) for _, line in zip(range(args.requests), file, strict=False)]
    for row in rows:
        for name in row["hash_ids"]:
            if name not in texts:
                texts[name] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=_BLOCK_CHARS))
        prompt = "".join(texts[name] for name in row["hash_ids"])[: args.max_model_len - _OUTPUT_TOKENS - 8]
        asked = {"model": "model", "prompt": prompt, "max_tokens": _OUTPUT_TOKENS, "temperature": 0}
        made.append(asked | {"ignore_eos": True, "stream": len(made) % 2 == 0})
    return made


async def _send(url: str, wanted: Sequence[Body], at: dict[int, Any]) -> dict[str, Any]:
    """All requests in their order, a few at a time; `at` a request's number something is called."""
    outcome = {"answered": 0, "failed_retryably": 0, "failed_otherwise": []}
    texts: list[str | None] = [None] * len(wanted)
    numbers, slowest = iter(range(len(wanted))), 0.0
    async with httpx.AsyncClient(timeout=120) as client:

        async def send() -> None:
            nonlocal slowest
            for i in numbers:
                if i in at:
                    await asyncio.to_thread(at[i])
                started = time.monotonic()
                try:
                    texts[i] = await answer(client, url, wanted[i])
                    outcome["answered"] += 1
                except httpx.HTTPError as error:
                    if can_be_retried(error):
                        outcome["failed_retryably"] += 1
                    else:
                        outcome["failed_otherwise"].append(repr(error))
                slowest = max(slowest, time.monotonic() - started)

        await asyncio.gather(*[send() for _ in range(_AT_ONCE)])
    return {**outcome, "slowest_s": round(slowest, 2), "texts": texts}


def _hit_rate(servers: Sequence[Server]) -> float:
    """Share of the prompts' tokens that were cached, of both servers."""
    found = [server.stats() for server in servers]
    hits, queries = (sum(stats[f"prefix_cache_{name}"] for stats in found) for name in ("hits", "queries"))
    return hits / queries


async def route(args: argparse.Namespace) -> dict[str, Any]:
    if not args.router or not args.trace:
        raise SystemExit("route needs --router and --trace")
    wanted, result, texts = _conversations(args), {"requests": args.requests}, {}
    for name in ("random", "cache_aware", "killed"):
        servers = [Server(args), Server(args)]
        policy = "cache_aware" if name == "killed" else name
        at = {len(wanted) // 3: servers[0].kill} if name == "killed" else {}
        with running(*servers), router(args, "--policy", policy, "--worker-urls", *(s.url for s in servers)) as url:
            sent = await _send(url, wanted, at)
            texts[name] = sent.pop("texts")
            result[name] = sent | ({} if at else {"hit_rate": round(_hit_rate(servers), 4)})
    result["unequal"] = sum(len({t for t in three if t is not None}) > 1 for three in zip(*texts.values(), strict=True))
    fine = [not result[name]["failed_otherwise"] for name in texts]
    gain = result["cache_aware"]["hit_rate"] > result["random"]["hit_rate"]
    result["holds"] = all(fine) and gain and not result["unequal"] and not result["random"]["failed_retryably"]
    return result
