"""Requests as a trace has them, sent as a router would: the prompt to one server, the rest to the other."""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from two_pools.servers import Server

ASK = {"do_remote_decode": True, "do_remote_prefill": False}
RETRY = (429, 500, 502, 503, 504)
Body = dict[str, Any]


@dataclass(slots=True)
class Streamed:
    """What a stream said: its text, and when its first token came, in seconds since the request was sent."""

    text: str
    ttft: float


def prompt(rng: random.Random, length: int) -> list[int]:
    """Random token ids that every vocabulary has."""
    return [rng.randrange(3, 250) for _ in range(length)]


async def streamed(client: httpx.AsyncClient, base: str, body: Body, since: float | None = None) -> Streamed:
    """A completion, streamed. Raises for anything that is no whole answer."""
    text, first, is_done = "", 0.0, False
    started = time.perf_counter() if since is None else since
    async with client.stream("POST", f"{base}/v1/completions", json=body | {"stream": True}) as reply:
        if reply.is_error:
            await reply.aread()
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            is_done = is_done or line == "data: [DONE]"
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise httpx.RemoteProtocolError(event["error"]["message"])
                first = first or time.perf_counter() - started
                text += event["choices"][0]["text"] if event["choices"] else ""
    if not is_done:
        raise httpx.RemoteProtocolError("the stream was cut off")
    return Streamed(text, first)


async def answer(client: httpx.AsyncClient, base: str, body: Body) -> str:
    """The text of a completion, streamed or not. Raises for anything that is no whole answer."""
    if body.get("stream"):
        return (await streamed(client, base, body)).text
    reply = await client.post(f"{base}/v1/completions", json=body)
    reply.raise_for_status()
    return reply.json()["choices"][0]["text"]


async def handed_over(client: httpx.AsyncClient, first: Server, body: Body) -> Body:
    """The request for the second server, after the first has computed its prompt."""
    asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK}
    reply = await client.post(f"{first.url}/v1/completions", json=asked)
    reply.raise_for_status()
    found = reply.json()
    return body | ({"kv_transfer_params": found["kv_transfer_params"]} if "kv_transfer_params" in found else {})


async def through_both(client: httpx.AsyncClient, servers: Sequence[Server], body: Body) -> str:
    """What a router does, where it stands in front of two pools."""
    return await answer(client, servers[1].url, await handed_over(client, servers[0], body))


async def at_once(client: httpx.AsyncClient, servers: Sequence[Server], body: Body) -> Streamed:
    """Both requests at the same time, under one `transfer_id`: the pages travel while the prompt is computed."""
    first, second = servers
    name, since = uuid.uuid4().hex, time.perf_counter()
    asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK | {"transfer_id": name}}
    prefill = asyncio.create_task(client.post(f"{first.url}/v1/completions", json=asked))
    where = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": first.port, "transfer_id": name}
    found = await streamed(client, second.url, body | {"kv_transfer_params": where}, since)
    (await prefill).raise_for_status()
    return found


def can_be_retried(error: httpx.HTTPError) -> bool:
    """Whether a client would send a request again that ended so."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in RETRY
    return isinstance(error, httpx.TransportError)


def bodies(args: argparse.Namespace, count: int) -> list[Body]:
    """Requests with a trace's lengths, scaled to the model; every other one is streamed, every third is seeded."""
    rng = random.Random(0)
    lengths = [(rng.randint(20, 300), rng.randint(4, 24)) for _ in range(count)]
    if args.trace:
        with open(args.trace) as file:
            rows = [row for _, row in zip(range(count), csv.DictReader(file), strict=False)]
        lengths = [(max(8, int(r["ContextTokens"]) // 4), max(2, int(r["GeneratedTokens"]) // 8)) for r in rows]
    made = []
    for i, (length, output) in enumerate(lengths):
        ids = prompt(rng, min(length, args.max_model_len // 2))
        sampling = {"temperature": 1.0, "seed": i} if i % 3 == 0 else {"temperature": 0}
        asked = {"model": "model", "prompt": ids, "max_tokens": min(output, 32), "stream": i % 2 == 0}
        made.append({**asked, "ignore_eos": True, **sampling})
    return made


def greedy(ids: list[int], max_tokens: int) -> Body:
    """A plain request of so many tokens."""
    return {"model": "model", "prompt": ids, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
