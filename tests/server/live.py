"""A server in a thread, and one in a process of its own, for tests that speak HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import AsyncLLM
from jaxllm.server.app import make_app
from jaxllm.server.context import Settings
from jaxllm.server.run import Listen, make_server
from tests.helpers.patience import patience

KEY = "a-test-key"
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 20,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
}


@dataclass(frozen=True, slots=True)
class Live:
    """A running server."""

    url: str
    llm: AsyncLLM


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(
    model: Path, *, settings: dict[str, Any] | None = None, listen: dict[str, Any] | None = None, **engine: Any
) -> Iterator[Live]:
    """Serve `model` in a thread until the block ends; every page must be free then.

    With `listen` (a unix socket, TLS files) the caller asks whether it is healthy.
    """
    llm = AsyncLLM(str(model), use_tqdm=False, **(ENGINE | engine))
    chosen = Settings(**{"served_model_names": ("tiny", "alias"), "api_keys": (KEY,), **(settings or {})})
    port = free_port()
    server = make_server(make_app(llm, chosen), llm, Listen(port=port, **(listen or {})))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if listen is None:
            wait_until_healthy(f"http://127.0.0.1:{port}")
        yield Live(f"http{'s' if listen and 'ssl_certfile' in listen else ''}://127.0.0.1:{port}", llm)
        wait_until(lambda: not llm.engine.has_work)
        if llm.thread.is_alive:
            llm.engine.pool.check([])
    finally:
        server.should_exit = True
        thread.join(patience(10))
        llm.shutdown()


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Poll; an AssertionError when it never holds."""
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_until_healthy(url: str, seconds: float = 240.0) -> None:
    """Until `/health` answers 200."""

    def healthy() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=patience(5)) as answer:
                return answer.status == 200
        except OSError:
            return False

    wait_until(healthy, seconds)


@contextlib.contextmanager
def process(model: Path, script: str, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run `script` (Python that calls the command line) as a process that serves `model`."""
    port = free_port()
    engine = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-c", script, "serve", f"--model={model}", f"--port={port}", *engine, *flags]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as child:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}")
            yield child, f"http://127.0.0.1:{port}"
        finally:
            if child.poll() is None:
                child.kill()
