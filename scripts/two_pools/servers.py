"""Servers and routers as child processes, for the time of a block."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

ROLES = ("kv_producer", "kv_consumer")
TRANSFER = {"timeout_seconds": 5, "lease_seconds": 10, "heartbeat_seconds": 2}


class Server:
    """One `jaxllm serve`, that can be killed and started again.

    Args:
        args: the command line: model, sizes, and `flags` for every server.
        *flags: of this one.
        cores: that it may run on, as taskset takes them.
    """

    def __init__(self, args: argparse.Namespace, *flags: str, cores: str | None = None):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        pin = ["taskset", "-c", cores] if cores else []
        command = [*pin, sys.executable, "-m", "jaxllm", "serve", "--model", args.model, "--port", str(self.port)]
        sizes = ["--max-model-len", str(args.max_model_len), "--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
        named = ["--served-model-name", "model", "--log-level", "warning"]
        self._command = [*command, *named, *sizes, *args.flags, *flags]
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, env=os.environ)

    def kill(self, how: int = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        self._process.send_signal(how)
        self._process.wait()

    def wait(self, seconds: float = 600.0) -> None:
        """Until it is healthy and compiles nothing in the background any more, which would show in what is timed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                health = httpx.get(f"{self.url}/health", timeout=2)
                if health.status_code == 200 and "warming_up" not in health.json():
                    return
            time.sleep(0.2)
        raise SystemExit(f"a server did not start: {' '.join(self._command)}")

    def stats(self) -> dict[str, Any]:
        """All its figures."""
        return httpx.get(f"{self.url}/stats", timeout=10).json()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(*servers: Server) -> Iterator[None]:
    """Wait until all are healthy; at the end of the block they are killed."""
    try:
        for server in servers:
            server.wait()
        yield
    finally:
        for server in servers:
            server.kill()


def pools(args: argparse.Namespace, *flags: str, pinned: bool = False) -> tuple[Server, Server]:
    """The prefill and the decode server; `pinned`: a core each."""
    transfer = [f"--kv-transfer-config={json.dumps(TRANSFER | {'kv_role': role})}" for role in ROLES]
    first, second = (Server(args, flag, *flags, cores=str(i) if pinned else None) for i, flag in enumerate(transfer))
    return first, second


@contextlib.contextmanager
def router(args: argparse.Namespace, *flags: str) -> Iterator[str]:
    """vllm-router, until the end of the block: its address. `flags` say what it stands in front of."""
    port = free_port()
    command = [args.router, *flags, "--port", str(port), "--host", "127.0.0.1", "--prometheus-port", str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise SystemExit(f"the router did not start: {' '.join(command)}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def in_front_of_pools(args: argparse.Namespace, servers: Sequence[Server]) -> Iterator[str | None]:
    """The router in front of a prefill and a decode server, where its path is given."""
    if not args.router:
        yield None
        return
    prefill, decode = servers
    with router(args, "--vllm-pd-disaggregation", "--prefill", prefill.url, "--decode", decode.url) as url:
        yield url
