"""HTTP/1.1 as uvicorn speaks it, with an end to requests whose head does not arrive, and a short way for streams.

h11 checks every message; a token's event needs no check but its length in front, which is most of what it cost.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0


class BoundedHeadProtocol(H11Protocol):
    """Closes a connection on which no whole head of a request has come in `HEAD_SECONDS`."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """The first head may take so long."""
        super().connection_made(transport)
        self.app = _with_direct_chunks(self.app)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """A head begins, goes on or is complete."""
        if not self._is_answering:
            self._expect_head()
        super().data_received(data)
        if self._is_answering:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        self._stop()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _close(self) -> None:
        if not self._is_answering and not self.transport.is_closing():
            self.transport.close()


def _with_direct_chunks(app: Any) -> Any:
    """The app, whose streams write their chunks themselves between the head and the end, which are h11's."""

    async def run(scope: Any, receive: Any, send: Any) -> None:
        cycle, is_direct = send.__self__, False  # uvicorn's `RequestResponseCycle`

        async def send_piece(message: Any) -> None:
            nonlocal is_direct
            if not is_direct or not message.get("more_body"):
                await send(message)
                is_direct = message["type"] == "http.response.start" and _is_chunked(scope, message)
                return
            if cycle.flow.write_paused and not cycle.disconnected:
                await cycle.flow.drain()
            if (body := message.get("body", b"")) and not cycle.disconnected:
                cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

        await app(scope, receive, send_piece)

    return run


def _is_chunked(scope: Any, start: Any) -> bool:
    """Whether h11 frames the body of this answer in chunks."""
    has_body = scope["method"] != "HEAD" and start["status"] not in (204, 304)
    has_length = any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in start.get("headers", ()))
    return scope["http_version"] == "1.1" and has_body and not has_length
