"""Two servers, one for prompts and one for answers, driven as a router would: equal answers, kills, even tokens.

    python scripts/drive_pools.py equal --model FOLDER [--router VLLM_ROUTER] [--trace FILE.csv] [--requests N]
    python scripts/drive_pools.py kills --model FOLDER [--kills 50]
    python scripts/drive_pools.py even --model FOLDER [--prompt-len 4096] [--seconds 40] [--plot FILE.png]

`equal` sends a trace's requests through the router (without one: both requests of the contract itself), streams and
not, and compares every answer with the decode server's own. `kills` ends either server at random moments, starts it
again, and checks that every request is answered rightly or fails soon with an error that may be retried, and that no
page stays in use. `even` measures the time between tokens of 8 streams with and without long prompts arriving all the
time: two pools on a core each, and one server on both. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

ASK = {"do_remote_decode": True, "do_remote_prefill": False}
RETRY = (429, 500, 502, 503, 504)


class Server:
    """One `jaxllm serve`, that can be killed and started again; `cores` as taskset takes them."""

    def __init__(self, args: argparse.Namespace, *flags: str, cores: str | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        pin = ["taskset", "-c", cores] if cores else []
        self._command = [
            *pin,
            sys.executable,
            "-m",
            "jaxllm",
            "serve",
            "--model",
            args.model,
            "--port",
            str(self.port),
            "--max-model-len",
            str(args.max_model_len),
            "--served-model-name",
            "model",
            "--log-level",
            "warning",
            "--kv-cache-memory-bytes",
            str(args.kv_cache_memory_bytes),
            *args.flags,
            *flags,
        ]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, env=os.environ)

    def kill(self, how: int = signal.SIGKILL) -> None:
        self._process.send_signal(how)
        self._process.wait()

    def wait(self, seconds: float = 600.0) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.2)
        raise SystemExit(f"a server did not start: {' '.join(self._command)}")

    def stats(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/stats", timeout=10).json()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    try:
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.kill()


def pools(args: argparse.Namespace, *, pinned: bool = False) -> tuple[Server, Server]:
    """The prefill and the decode server."""
    roles = ("kv_producer", "kv_consumer")
    config = {"timeout_seconds": 5, "lease_seconds": 10}
    flags = [f"--kv-transfer-config={json.dumps(config | {'kv_role': role})}" for role in roles]
    first, second = (Server(args, flag, cores=str(i) if pinned else None) for i, flag in enumerate(flags))
    return first, second


async def answer(client: httpx.AsyncClient, base: str, body: dict[str, Any]) -> str:
    """The text of a completion, streamed or not. Raises for anything that is no whole answer."""
    if not body.get("stream"):
        reply = await client.post(f"{base}/v1/completions", json=body)
        reply.raise_for_status()
        return reply.json()["choices"][0]["text"]
    text, done = "", False
    async with client.stream("POST", f"{base}/v1/completions", json=body) as reply:
        if reply.is_error:
            await reply.aread()
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise httpx.RemoteProtocolError(event["error"]["message"])
                text += event["choices"][0]["text"] if event["choices"] else ""
    if not done:
        raise httpx.RemoteProtocolError("the stream was cut off")
    return text


async def through_both(client: httpx.AsyncClient, servers: Sequence[Server], body: dict[str, Any]) -> str:
    """What a router does: the prompt to the first, the request with what that answers to the second."""
    asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK}
    first = await client.post(f"{servers[0].url}/v1/completions", json=asked)
    first.raise_for_status()
    params = {"kv_transfer_params": first.json()["kv_transfer_params"]} if "kv_transfer_params" in first.json() else {}
    return await answer(client, servers[1].url, body | params)


def bodies(args: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Requests with a trace's lengths, scaled to the model; every other one is streamed, every third is seeded."""
    rng = random.Random(0)
    lengths = [(rng.randint(20, 300), rng.randint(4, 24)) for _ in range(count)]
    if args.trace:
        with open(args.trace) as file:
            rows = [row for _, row in zip(range(count), csv.DictReader(file), strict=False)]
        lengths = [(max(8, int(r["ContextTokens"]) // 4), max(2, int(r["GeneratedTokens"]) // 8)) for r in rows]
    made = []
    for i, (prompt, output) in enumerate(lengths):
        ids = [rng.randrange(3, 250) for _ in range(min(prompt, args.max_model_len // 2))]
        sampling = {"temperature": 1.0, "seed": i} if i % 3 == 0 else {"temperature": 0}
        made.append(
            {
                "model": "model",
                "prompt": ids,
                "max_tokens": min(output, 32),
                "stream": i % 2 == 0,
                "ignore_eos": True,
                **sampling,
            }
        )
    return made


async def equal(args: argparse.Namespace) -> dict[str, Any]:
    servers = pools(args)
    with running(*servers), router(args, servers) as url:
        limits, gate = httpx.Limits(max_connections=64), asyncio.Semaphore(8)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:

            async def both(body: dict[str, Any]) -> bool:
                async with gate:
                    got = await (answer(client, url, body) if url else through_both(client, servers, body))
                    return got == await answer(client, servers[1].url, {**body, "stream": False})

            same = await asyncio.gather(*[both(body) for body in bodies(args, args.requests)])
        moved = {key: value for key, value in servers[1].stats().items() if key.startswith("kv_transfer")}
        return {"requests": len(same), "equal": sum(same), "router": bool(url), **moved}


@contextlib.contextmanager
def router(args: argparse.Namespace, servers: Sequence[Server]) -> Iterator[str | None]:
    """vllm-router in front of them, if its path is given."""
    if not args.router:
        yield None
        return
    port = free_port()
    command = [
        args.router,
        "--vllm-pd-disaggregation",
        "--prefill",
        servers[0].url,
        "--decode",
        servers[1].url,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--prometheus-port",
        str(free_port()),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def kills(args: argparse.Namespace) -> dict[str, Any]:
    servers, rng = pools(args), random.Random(0)
    wanted, right, failed, slow = bodies(args, 24), 0, 0, 0.0
    with running(*servers):
        async with httpx.AsyncClient(timeout=120) as client:
            expected = [await answer(client, servers[1].url, {**body, "stream": False}) for body in wanted]

            async def one(i: int) -> bool | None:
                started, result = time.monotonic(), None
                try:
                    result = await through_both(client, servers, wanted[i]) == expected[i]
                except httpx.HTTPStatusError as error:
                    assert error.response.status_code in RETRY, error.response.text
                except httpx.TransportError:
                    pass
                nonlocal slow
                slow = max(slow, time.monotonic() - started)
                return result

            for _ in range(args.kills):
                victim = rng.choice(servers)
                under_way = [asyncio.create_task(one(rng.randrange(len(wanted)))) for _ in range(6)]
                await asyncio.sleep(rng.uniform(0.0, 0.6))
                victim.kill(rng.choice((signal.SIGKILL, signal.SIGTERM)))
                results = await asyncio.gather(*under_way)
                assert False not in results, "a wrong answer"
                right, failed = right + results.count(True), failed + results.count(None)
                await asyncio.to_thread(victim.start)
                await asyncio.to_thread(victim.wait)
            await asyncio.sleep(12)  # the leases of what nobody fetched
        usage = [server.stats()["kv_cache_usage_perc"] for server in servers]
    assert slow < args.limit, f"a request took {slow:.1f} s"
    assert usage == [0.0, 0.0], f"pages stay in use: {usage}"
    return {"kills": args.kills, "answered": right, "failed_retryably": failed, "slowest_s": round(slow, 2)}


async def gaps(servers: Sequence[Server], args: argparse.Namespace, prompts: bool) -> dict[str, float]:
    """Times between tokens of 8 streams, in milliseconds, while long prompts arrive all the time or not."""
    rng, seen, begun = random.Random(1), [], asyncio.Semaphore(0)
    begin = float("inf")
    async with httpx.AsyncClient(timeout=600) as client:

        async def listen() -> None:
            body = {
                "model": "model",
                "prompt": [rng.randrange(3, 250) for _ in range(64)],
                "stream": True,
                "max_tokens": args.max_model_len - 80,
                "ignore_eos": True,
                "temperature": 0,
            }
            last = None
            async with client.stream("POST", f"{servers[-1].url}/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        if last is None:
                            begun.release()
                        elif now > begin:
                            seen.append(now - last)
                        last = now

        async def ask() -> None:
            while True:
                prompt = [rng.randrange(3, 250) for _ in range(args.prompt_len)]
                body = {"model": "model", "prompt": prompt, "max_tokens": 2, "temperature": 0}
                await (
                    through_both(client, servers, body) if len(servers) > 1 else answer(client, servers[0].url, body)
                )

        tasks = [asyncio.create_task(listen()) for _ in range(8)]
        for _ in tasks:
            await begun.acquire()
        tasks += [asyncio.create_task(ask()) for _ in range(2)] if prompts else []
        begin = time.perf_counter() + 2.0
        await asyncio.sleep(2.0 + args.seconds)
        for task in tasks:
            task.cancel()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(end, Exception):
                raise end
    ordered = sorted(seen)
    return {f"p{p}_ms": round(1e3 * ordered[min(len(ordered) - 1, int(p / 100 * len(ordered)))], 2) for p in (50, 99)}


async def even(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, make in (("two_pools", lambda: pools(args, pinned=True)), ("one_server", lambda: (Server(args),))):
        servers = make()
        with running(*servers):
            result[name] = {"quiet": await gaps(servers, args, False), "prompts": await gaps(servers, args, True)}
            pair = result[name]
            pair["p99_ratio"] = round(pair["prompts"]["p99_ms"] / pair["quiet"]["p99_ms"], 2)
    if args.plot:
        plot(result, args.plot)
    return result


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2))
    names = [(pool, case) for pool in result for case in ("quiet", "prompts")]
    axes.bar([f"{p}\n{c}".replace("_", " ") for p, c in names], [result[p][c]["p99_ms"] for p, c in names])
    axes.set_ylabel("time between tokens, p99 (ms)")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("equal", "kills", "even"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--router", metavar="PATH")
    parser.add_argument("--trace", metavar="FILE")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--limit", type=float, default=15.0, help="seconds that a request may take in `kills`")
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30)
    parser.add_argument("--plot", metavar="FILE")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # after it: flags of both servers
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]
    run = {"equal": equal, "kills": kills, "even": even}[args.what]
    print(json.dumps(asyncio.run(run(args))))


if __name__ == "__main__":
    main()
