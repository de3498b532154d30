"""The process around the app: its thread, signals, the drain, and an exit when the engine dies.

The socket answers before there is an engine; `attach` gives it one. SIGTERM or Ctrl-C: new requests get 503, those
under way finish up to `shutdown_timeout`, then exit code 0. A second signal ends at once. A dead engine: every
request has its error, then exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from jaxllm.server.listen import Listen
from jaxllm.server.protocol import BoundedHeadProtocol

if TYPE_CHECKING:
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.pool.face import PoolFace

    Served = AsyncLLM | PoolFace

log = logging.getLogger(__name__)
_WATCH_SECONDS = 0.25
_LAST_WORDS_SECONDS = 1.0  # for the last events to reach the clients
_JOIN_SECONDS = 0.2  # signal handlers run between two waits


@contextlib.contextmanager
def serving(app: Any, listen: Listen, bound: socket.socket) -> Iterator[DrainingServer]:
    """Answer on a bound socket from a thread of its own; give the server its engine with `attach`, then `wait`."""
    server = make_server(app, None, listen)
    thread = threading.Thread(target=server.run, args=([bound],), name="http", daemon=True)
    thread.start()
    server.thread = thread
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(_LAST_WORDS_SECONDS)


def make_server(app: Any, llm: Served | None, listen: Listen) -> DrainingServer:
    """A server that has not started yet."""
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        uds=listen.uds,
        ssl_keyfile=listen.ssl_keyfile,
        ssl_certfile=listen.ssl_certfile,
        ssl_keyfile_password=listen.ssl_keyfile_password,
        http=BoundedHeadProtocol,  # h11, which bounds the size of headers
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        log_config=None,
    )
    return DrainingServer(config, llm, listen.shutdown_timeout)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which drains before it closes its sockets.

    Attributes:
        exit_code: of the process; 1 until it has started and ended well.
        thread: that runs it, where it is not the main one.
    """

    def __init__(self, config: uvicorn.Config, llm: Served | None, shutdown_timeout: float):
        super().__init__(config)
        self.exit_code = 1
        self.thread: threading.Thread | None = None
        self._llm, self._shutdown_timeout = llm, shutdown_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    def attach(self, llm: Served) -> None:
        """Watch this engine from now on; from any thread."""
        self._llm = llm
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_watching)

    def wait(self) -> int:
        """Until a signal or the engine's death has ended it; returns the exit code. On the main thread."""
        assert self.thread is not None, "it runs on this thread"
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.thread.is_alive():
                self.thread.join(_JOIN_SECONDS)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.exit_code

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On SIGTERM and SIGINT; not handed to uvicorn, which would close the sockets at once."""
        self._signals += 1
        if self._signals > 1:
            print("jaxllm: ended at once, with requests under way", file=sys.stderr, flush=True)
            os._exit(128 + sig)

    async def startup(self, sockets: Any = None) -> None:
        """Also start watching for signals and for the engine's death."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started and self._llm is not None:
            self._start_watching()

    def _log_started_message(self, listeners: Any) -> None:
        """The command says where it serves, once it does."""

    def _start_watching(self) -> None:
        assert self._llm is not None
        self._watcher = asyncio.ensure_future(self._watch(self._llm))

    async def _watch(self, llm: Served) -> None:
        while not self._signals and llm.thread.is_alive:
            await asyncio.sleep(_WATCH_SECONDS)
        if self._signals:
            log.info("shutting down: requests under way have %g s", self._shutdown_timeout)
            if await self._drained(llm):
                log.info("every request has finished")
            else:
                log.warning("time is up: ending %d requests", llm.num_open)
                llm.fail_all("the server is shutting down; send the request again elsewhere")
                await asyncio.sleep(_LAST_WORDS_SECONDS)
        if llm.thread.is_alive:
            self.exit_code = 0
        else:
            log.critical("the engine is dead; exiting")
            await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.should_exit = True

    async def _drained(self, llm: Served) -> bool:
        drain = asyncio.ensure_future(llm.drain(self._shutdown_timeout))
        while not drain.done() and llm.thread.is_alive:
            await asyncio.wait((drain,), timeout=_WATCH_SECONDS)
        drain.cancel()
        return drain.done() and not drain.cancelled() and drain.result()
