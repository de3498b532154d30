"""The process around the app: sockets, signals, the drain, and an exit when the engine dies.

SIGTERM or Ctrl-C: new requests get 503, those under way finish up to `shutdown_timeout`, then exit code 0. A second
signal ends at once. A dead engine: every request has its error, then exit code 1.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import uvicorn

from jaxllm.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)
_WATCH_SECONDS = 0.25
_LAST_WORDS_SECONDS = 1.0  # for the last events to reach the clients


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where to listen and how long a drain may take (seconds)."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    shutdown_timeout: float = 30.0


def serve(app: Any, llm: AsyncLLM, listen: Listen) -> int:
    """Serve until a signal or the engine's death; returns the exit code."""
    server = make_server(app, llm, listen)
    try:
        server.run()
    finally:
        llm.shutdown()
    return server.exit_code


def make_server(app: Any, llm: AsyncLLM, listen: Listen) -> DrainingServer:
    """A server that has not started yet."""
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        uds=listen.uds,
        ssl_keyfile=listen.ssl_keyfile,
        ssl_certfile=listen.ssl_certfile,
        ssl_keyfile_password=listen.ssl_keyfile_password,
        http="h11",  # bounds the size of headers
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
    """uvicorn's server, which drains before it closes its sockets."""

    def __init__(self, config: uvicorn.Config, llm: AsyncLLM, shutdown_timeout: float):
        super().__init__(config)
        self.exit_code = 1  # until it has started and ended well
        self._llm, self._shutdown_timeout = llm, shutdown_timeout
        self._signals = 0

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On SIGTERM and SIGINT; not handed to uvicorn, which would close the sockets at once."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True

    async def startup(self, sockets: Any = None) -> None:
        """Also start watching for signals and for the engine's death."""
        await super().startup(sockets)
        if self.started:
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while not self._signals and self._llm.thread.is_alive:
            await asyncio.sleep(_WATCH_SECONDS)
        if self._signals:
            log.info("shutting down: requests under way have %g s", self._shutdown_timeout)
            if await self._drained():
                log.info("every request has finished")
            else:
                log.warning("time is up: ending %d requests", self._llm.num_open)
                self._llm.fail_all("the server is shutting down; send the request again elsewhere")
                await asyncio.sleep(_LAST_WORDS_SECONDS)
        if self._llm.thread.is_alive:
            self.exit_code = 0
        else:
            log.critical("the engine is dead; exiting")
            await asyncio.sleep(_LAST_WORDS_SECONDS)
        self.should_exit = True

    async def _drained(self) -> bool:
        drain = asyncio.ensure_future(self._llm.drain(self._shutdown_timeout))
        while not drain.done() and self._llm.thread.is_alive:
            await asyncio.wait((drain,), timeout=_WATCH_SECONDS)
        drain.cancel()
        return drain.done() and not drain.cancelled() and drain.result()
