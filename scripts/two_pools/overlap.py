"""`overlap`: how much of a transfer goes by while its prompt is computed, and what the first token costs for it."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import httpx

from two_pools.requests import at_once, greedy, handed_over, prompt, streamed
from two_pools.servers import Server, pools, running

_LIMITS = {"hidden": 0.8, "ttft": 1.1}


async def overlap(args: argparse.Namespace) -> dict[str, Any]:
    """The two pools on a core each; the server they are compared with on the first of these cores."""
    rng = random.Random(args.seed)
    chunk = ["--max-num-batched-tokens", str(args.chunk)]
    alone = Server(args, *chunk, cores="0")
    servers = pools(args, *chunk, pinned=True)
    ttft: dict[str, list[float]] = {"one_server": [], "at_once": [], "one_after_the_other": []}
    hidden: list[float] = []
    with running(alone, *servers):
        async with httpx.AsyncClient(timeout=600) as client:
            for number in range(args.rounds + 1):  # the first is not counted
                bodies = [greedy(prompt(rng, args.prompt_len), 2) for _ in ttft]
                one = await streamed(client, alone.url, bodies[0])
                before = servers[1].stats()
                early = await at_once(client, servers, bodies[1])
                hidden.append(_hidden(before, servers[1].stats()))
                late = await _one_after_the_other(client, servers, bodies[2])
                for times, found in zip(ttft.values(), (one.ttft, early.ttft, late), strict=True):
                    times += [found] if number else []
        stats = servers[1].stats()
    medians = {name: round(statistics.median(times), 3) for name, times in ttft.items()}
    ratio = medians["at_once"] / medians["one_server"]
    share = statistics.median(hidden[1:])
    return {
        "prompt_len": args.prompt_len,
        "chunk": args.chunk,
        "rounds": args.rounds,
        "ttft_s": medians,
        "ttft_all_s": {name: [round(t, 3) for t in times] for name, times in ttft.items()},
        "ttft_ratio": round(ratio, 3),
        "ttft_ratio_one_after_the_other": round(medians["one_after_the_other"] / medians["one_server"], 3),
        "hidden_share": round(share, 3),
        "failures": stats["kv_transfer_failures"],
        "bytes": stats["kv_transfer_bytes"],
        "holds": share >= _LIMITS["hidden"] and ratio <= _LIMITS["ttft"] and not stats["kv_transfer_failures"],
    }


def _hidden(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Share of the time of the transfers in between that went by while the prompt was computed."""
    seconds, exposed = (after[name] - before[name] for name in ("kv_transfer_seconds", "kv_transfer_exposed_seconds"))
    return max(0.0, 1.0 - exposed / seconds) if seconds else 0.0


async def _one_after_the_other(
    client: httpx.AsyncClient, servers: tuple[Server, Server], body: dict[str, Any]
) -> float:
    """Seconds to the first token where the second request waits for the answer to the first, as with vllm-router."""
    since = time.perf_counter()
    return (await streamed(client, servers[1].url, await handed_over(client, servers[0], body), since)).ttft
