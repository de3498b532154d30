"""`admission`: predicted times to the first token beside measured ones, and what an SLO keeps under too much load."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from two_pools.requests import Body, bodies, percentile, streamed
from two_pools.servers import Server, running

_AT_ONCE = 8  # where nothing but answers sets the pace
_WARM_UP = 12
_LOADS = {"replay": 0.7, "overload": 1.5}  # of what one server sustains
_LIMITS = {"error": 0.2, "share_in_time": 0.99}
_SLO_TIMES_MEDIAN = 4.0


@dataclass(slots=True)
class _Seen:
    """Seconds to the first token of what was answered, and what was refused or failed."""

    ttft: list[float] = field(default_factory=list)
    refused: int = 0
    failed: list[str] = field(default_factory=list)

    async def ask(self, client: httpx.AsyncClient, url: str, body: Body) -> None:
        try:
            self.ttft.append((await streamed(client, url, body)).ttft)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 503 and "retry-after" in error.response.headers:
                self.refused += 1
            else:
                self.failed.append(error.response.text[:200])
        except httpx.TransportError as error:
            self.failed.append(repr(error))

    def summary(self) -> dict[str, Any]:
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        ttft = {name: round(percentile(self.ttft, share), 3) for name, share in shares.items()} if self.ttft else {}
        return {"admitted": len(self.ttft), "refused": self.refused, "failed": self.failed[:3], "ttft_s": ttft}


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None))


async def _saturated(url: str, wanted: Sequence[Body], seconds: float) -> tuple[float, _Seen]:
    """Requests per second where as many are under way as answers leave room for: more cannot be sustained."""
    seen, until, numbers = _Seen(), time.monotonic() + seconds, iter(range(10**9))
    started = time.monotonic()
    async with _client() as client:

        async def ask() -> None:
            while time.monotonic() < until:
                await seen.ask(client, url, wanted[next(numbers) % len(wanted)])

        await asyncio.gather(*[ask() for _ in range(_AT_ONCE)])
    return len(seen.ttft) / (time.monotonic() - started), seen


async def _offered(url: str, wanted: Sequence[Body], rate: float, seconds: float, seed: int) -> _Seen:
    """Requests that come when they come (a Poisson process), whatever is answered."""
    seen, rng, tasks = _Seen(), random.Random(seed), []
    until, number = time.monotonic() + seconds, seed * 1000
    async with _client() as client:
        while time.monotonic() < until:
            tasks.append(asyncio.create_task(seen.ask(client, url, wanted[number % len(wanted)])))
            number += 1
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    return seen


def _fresh(wanted: Sequence[Body], seed: int) -> list[Body]:
    """The same lengths with other tokens, so that nothing of them is cached."""
    rng = random.Random(seed)
    return [body | {"prompt": [rng.randrange(3, 250) for _ in body["prompt"]]} for body in wanted]


async def admission(args: argparse.Namespace) -> dict[str, Any]:
    wanted, result = bodies(args, 400), {}
    print("what one server sustains", file=sys.stderr, flush=True)
    server = Server(args)
    with running(server):
        await _saturated(server.url, _fresh(wanted, 1), args.seconds / 4)
        capacity, _ = await _saturated(server.url, _fresh(wanted, 2), args.seconds / 2)
    print(f"{_LOADS['replay']} of that, with predictions that refuse nothing", file=sys.stderr, flush=True)
    server = Server(args, "--slo", "ttft:1000s")  # a new one, whose predictions are those of the replay
    with running(server):
        await _saturated(server.url, _fresh(wanted, 1)[:_WARM_UP], 4.0)
        replay = await _offered(server.url, _fresh(wanted, 3), _LOADS["replay"] * capacity, args.seconds, 3)
        error = server.stats()["slo_ttft_prediction_error"]
    result["sustained_requests_per_s"] = round(capacity, 2)
    result["replay"] = replay.summary() | {"median_prediction_error": round(error, 3)}
    limit = args.slo or round(_SLO_TIMES_MEDIAN * percentile(replay.ttft, 0.5), 2)
    print(f"1.5 times as much, with --slo ttft:{limit}s", file=sys.stderr, flush=True)
    server = Server(args, "--slo", f"ttft:{limit}s")
    with running(server):
        await _saturated(server.url, _fresh(wanted, 4)[:_WARM_UP], 4.0)
        seen = await _offered(server.url, _fresh(wanted, 5), _LOADS["overload"] * capacity, args.seconds, 5)
    in_time = sum(ttft <= limit for ttft in seen.ttft) / max(1, len(seen.ttft))
    result["overload"] = seen.summary() | {"slo_ttft_s": limit, "share_in_time": round(in_time, 4)}
    failed = replay.failed or seen.failed
    result["holds"] = error < _LIMITS["error"] and in_time >= _LIMITS["share_in_time"] and not failed
    return result
