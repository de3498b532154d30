"""Server-sent events, and noticing that a client went away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from jaxllm.server.errors import as_api_error

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(data: Any, name: str | None = None) -> bytes:
    """One event. Lone surrogates cannot be sent and become question marks."""
    head = f"event: {name}\ndata: " if name else "data: "
    return f"{head}{_dumps(data)}\n\n".encode(errors="replace")


def failed_event(error: Exception) -> bytes:
    """How an OpenAI stream ends that cannot go on."""
    return as_api_error(error).event()


class EventStream(Response):
    """Sends what an iterator yields; a client that goes away ends it at once, an exception becomes an error event.

    Args:
        events: encoded events, any number in one piece.
        on_close: called exactly once at the end, whatever that is.
        headers: more of them.
        failed: how an exception goes out.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        *,
        failed: Callable[[Exception], bytes] | None = None,
    ):
        super().__init__(headers={"cache-control": "no-store", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._on_close, self._failed = events, on_close, failed or failed_event

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve it as ASGI."""
        try:
            with contextlib.suppress(ConnectionResetError):
                await _unless_disconnected(receive, self._send_all(send))
        finally:
            self._on_close()

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the client goes away (what is returned then reaches nobody)."""
    return await _unless_disconnected(request.receive, work)


async def _unless_disconnected(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise ConnectionResetError("the client went away") from None
        raise


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
