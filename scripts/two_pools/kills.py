"""`kills`: either server ends at random moments; nobody hangs, no answer is wrong, no page stays in use."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from two_pools.requests import Body, answer, bodies, can_be_retried, percentile, through_both
from two_pools.servers import TRANSFER, Server, pools, running

_AT_ONCE = 6  # requests under way at each kill
_SIGNALS = (signal.SIGKILL, signal.SIGTERM)


@dataclass(slots=True)
class _Tally:
    """What became of the requests; seconds from sending one to its answer or error."""

    answered: int = 0
    failed: int = 0
    wrong: int = 0
    not_retryable: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def _ask(client: httpx.AsyncClient, servers: Sequence[Server], body: Body, expected: str, tally: _Tally) -> None:
    started = time.monotonic()
    try:
        is_right = await through_both(client, servers, body) == expected
        tally.answered += is_right
        tally.wrong += not is_right
    except httpx.HTTPError as error:
        tally.failed += 1
        if not can_be_retried(error):
            tally.not_retryable.append(repr(error))
    tally.seconds.append(time.monotonic() - started)


async def kills(args: argparse.Namespace) -> dict[str, Any]:
    servers, rng, tally = pools(args), random.Random(args.seed), _Tally()
    wanted = bodies(args, 24)
    with running(*servers):
        async with httpx.AsyncClient(timeout=120) as client:
            expected = [await answer(client, servers[1].url, {**body, "stream": False}) for body in wanted]
            for number in range(args.kills):
                victim, how = rng.choice(servers), rng.choice(_SIGNALS)
                chosen = [rng.randrange(len(wanted)) for _ in range(_AT_ONCE)]
                asked = [asyncio.create_task(_ask(client, servers, wanted[i], expected[i], tally)) for i in chosen]
                await asyncio.sleep(rng.uniform(0.0, 0.6))
                ended = asyncio.create_task(asyncio.to_thread(victim.kill, how))  # a drain needs us to fetch meanwhile
                await asyncio.gather(*asked)
                await ended
                slowest = max(tally.seconds[-_AT_ONCE:])
                print(f"kill {number + 1}: {how.name}, slowest request {slowest:.2f} s", file=sys.stderr, flush=True)
                await asyncio.to_thread(victim.start)
                await asyncio.to_thread(victim.wait)
        await asyncio.sleep(TRANSFER["lease_seconds"] + 2)  # of what nobody fetched
        usage = [server.stats()["kv_cache_usage_perc"] for server in servers]
    result = {
        "kills": args.kills,
        "requests": len(tally.seconds),
        "answered_rightly": tally.answered,
        "failed_retryably": tally.failed - len(tally.not_retryable),
        "failed_otherwise": tally.not_retryable,
        "wrong": tally.wrong,
        "p50_s": round(percentile(tally.seconds, 0.5), 2),
        "slowest_s": round(max(tally.seconds), 2),
        "pages_in_use": usage,
    }
    result["holds"] = not tally.wrong and not tally.not_retryable and max(tally.seconds) < args.limit and not any(usage)
    return result
