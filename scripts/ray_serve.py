"""jaxllm on Ray Serve: plain replicas, or a pool for prompts and a pool for answers. Placement and restarts are Ray's.

    python scripts/ray_serve.py --replicas 2 -- --model smollm2-135m-instruct
    python scripts/ray_serve.py --prefill 1 --decode 2 -- --model smollm2-135m-instruct --max-model-len 4096

Replicas answer at http://HOST:8000/, pools at /prefill and /decode; of pools, `vllm-router --vllm-pd-disaggregation
--prefill http://HOST:8000/prefill --decode http://HOST:8000/decode` makes one service. What stands after `--` are flags
of `jaxllm serve`. Joins the Ray cluster that RAY_ADDRESS names, or starts one here; ends on Ctrl-C or SIGTERM. Needs
the extra `ray`.

Each replica is a Ray actor with a server of its own behind it, as a child process: where that ends, the replica reports
itself unhealthy and Ray starts another. Pages go straight from one server to the other, not through Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

START_SECONDS = 1800.0
_DROPPED = ("host", "content-length", "connection", "transfer-encoding")


class Server:
    """One replica: starts `jaxllm serve` and hands every request on to it."""

    def __init__(self, python: str, flags: list[str], role: str | None):
        host = ray.util.get_node_ip_address() if role else "127.0.0.1"
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        if role:  # which servers there are is Ray's to decide, so each may fetch from any
            config = {"kv_role": role, "kv_ip": host, "peers": ["*"]}
            flags = [*flags, f"--kv-transfer-config={json.dumps(config)}"]
        command = [python, "-m", "jaxllm", "serve", "--host", host, "--port", str(port), *flags]
        self._url = f"http://{host}:{port}"
        self._process = subprocess.Popen(command, env=os.environ)
        self._client = httpx.AsyncClient(base_url=self._url, timeout=None)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_health()
            try:
                if httpx.get(f"{self._url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise RuntimeError("the server did not start in time; see its log")

    def check_health(self) -> None:
        """Ray asks: a replica whose server has ended is replaced."""
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"the server has ended with exit code {code}")

    async def __call__(self, request: Request) -> Response:
        """Hand one request on, and its answer back as it comes."""
        path = request.url.path.removeprefix(request.scope.get("root_path", "")) or "/"
        headers = {name: value.strip() for name, value in request.headers.items() if name not in _DROPPED}
        asked = self._client.build_request(
            request.method, path, params=request.query_params, headers=headers, content=await request.body()
        )
        answer = await self._client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:
                await answer.aclose()

        kept = {name: value for name, value in answer.headers.items() if name not in _DROPPED}
        return StreamingResponse(body(), status_code=answer.status_code, headers=kept)

    def __del__(self) -> None:
        if (process := getattr(self, "_process", None)) is not None and process.poll() is None:
            process.terminate()


def deploy(args: argparse.Namespace, name: str, count: int, role: str | None, route: str) -> None:
    """One pool of `count` replicas under `route`."""
    options: dict[str, Any] = {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica}
    deployment = serve.deployment(Server).options(
        name=name,
        num_replicas=count,
        ray_actor_options=options,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=30,
    )
    serve.run(deployment.bind(args.python, args.flags, role), name=name, route_prefix=route, blocking=False)
    print(f"{name}: {count} x at http://{args.host}:{args.port}{route}", file=sys.stderr, flush=True)


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpus-per-replica", type=float, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0)
    parser.add_argument("--python", default=sys.executable, help="that has jaxllm, where it is not Ray's own")
    args = parser.parse_args(sys.argv[1:at])
    args.flags = sys.argv[at + 1 :]
    if not args.replicas and not (args.prefill and args.decode):
        parser.error("give --replicas, or --prefill and --decode")
    serve.start(http_options={"host": args.host, "port": args.port})
    if args.replicas:
        deploy(args, "jaxllm", args.replicas, None, "/")
    if args.prefill:
        deploy(args, "prefill", args.prefill, "kv_producer", "/prefill")
        deploy(args, "decode", args.decode, "kv_consumer", "/decode")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
