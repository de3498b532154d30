"""`equal`: a trace through both servers, every answer compared with the decode server's own."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httpx

from two_pools.requests import Body, answer, bodies, through_both
from two_pools.servers import in_front_of_pools, pools, running


async def equal(args: argparse.Namespace) -> dict[str, Any]:
    servers = pools(args)
    with running(*servers), in_front_of_pools(args, servers) as url:
        limits, gate = httpx.Limits(max_connections=64), asyncio.Semaphore(8)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def both(body: Body) -> bool:
                async with gate:
                    got = await (answer(client, url, body) if url else through_both(client, servers, body))
                    return got == await answer(client, servers[1].url, {**body, "stream": False})

            same = await asyncio.gather(*[both(body) for body in bodies(args, args.requests)])
        moved = {key: value for key, value in servers[1].stats().items() if key.startswith("kv_transfer")}
        return {"requests": len(same), "equal": sum(same), "router": bool(url), **moved}
