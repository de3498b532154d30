"""`even`: times between tokens of 8 streams while long prompts arrive all the time, in two pools and in one server."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from two_pools.requests import answer, greedy, percentile, prompt, through_both
from two_pools.servers import Server, pools, running

_STREAMS, _PROMPTS_AT_ONCE = 8, 2
_SETTLE_SECONDS = 2.0
_SHARES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "max_ms": 1.0}


class _Listener:
    """Notes the times between tokens from `begin` on."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.begin = float("inf")
        self.begun = asyncio.Semaphore(0)

    async def listen(self, client: httpx.AsyncClient, url: str, ids: list[int], max_tokens: int) -> None:
        last = None
        body = greedy(ids, max_tokens) | {"stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    if last is None:
                        self.begun.release()
                    elif now > self.begin:
                        self.gaps.append(now - last)
                    last = now
        raise SystemExit("a stream ended before the measurement did: raise --max-model-len or lower --seconds")


async def _gaps(servers: Sequence[Server], args: argparse.Namespace, *, prompts: bool) -> dict[str, float]:
    """Percentiles in milliseconds, tokens seen, and prompts answered meanwhile."""
    rng, listener, answered = random.Random(1), _Listener(), 0
    async with httpx.AsyncClient(timeout=600) as client:

        async def ask() -> None:
            nonlocal answered
            while True:
                body = greedy(prompt(rng, args.prompt_len), 2)
                await (
                    through_both(client, servers, body) if len(servers) > 1 else answer(client, servers[0].url, body)
                )
                answered += 1

        ids = [prompt(rng, 64) for _ in range(_STREAMS)]
        most = args.max_model_len - 80
        tasks = [asyncio.create_task(listener.listen(client, servers[-1].url, one, most)) for one in ids]
        for _ in tasks:
            await listener.begun.acquire()
        tasks += [asyncio.create_task(ask()) for _ in range(_PROMPTS_AT_ONCE)] if prompts else []
        listener.begin = time.perf_counter() + _SETTLE_SECONDS
        await asyncio.sleep(_SETTLE_SECONDS + args.seconds)
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, (Exception, SystemExit)):
                raise end
    found = {name: round(1e3 * percentile(listener.gaps, share), 2) for name, share in _SHARES.items()}
    return found | {"tokens": len(listener.gaps), "prompts_answered": answered}


async def even(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"prompt_len": args.prompt_len, "seconds": args.seconds}
    for name, make in (("two_pools", lambda: pools(args, pinned=True)), ("one_server", lambda: (Server(args),))):
        servers = make()
        with running(*servers):
            pair = {
                "quiet": await _gaps(servers, args, prompts=False),
                "prompts": await _gaps(servers, args, prompts=True),
            }
            ratio = round(pair["prompts"]["p99_ms"] / pair["quiet"]["p99_ms"], 2)
            result[name] = pair | {"p99_ratio": ratio}
            if name == "two_pools":
                stats = servers[1].stats()
                result[name]["transfers"] = {k: v for k, v in stats.items() if k.startswith("kv_transfer")}
    result["holds"] = result["two_pools"]["p99_ratio"] <= 1.3
    if args.plot:
        _plot(result, args.plot)
    return result


def _plot(result: dict[str, Any], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2))
    pools_ = {"two_pools": "two pools,\na core each", "one_server": "one server,\nboth cores"}
    for i, (case, words) in enumerate((("quiet", "no prompts"), ("prompts", "prompts all the time"))):
        heights = [result[pool][case]["p99_ms"] for pool in pools_]
        bars = axes.bar([x + 0.4 * i for x in range(len(pools_))], heights, width=0.38, label=words)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set_xticks([x + 0.2 for x in range(len(pools_))], list(pools_.values()))
    axes.set_ylabel("time between tokens, p99 (ms)")
    axes.set_title(f"8 streams; prompts of {result['prompt_len']} tokens", fontsize=10)
    axes.margins(y=0.15)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
