"""What a streaming client reads while it waits: comment lines of server-sent events, which clients skip."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

_EVERY_SECONDS = 1.0


async def with_comments(
    events: AsyncIterator[bytes], say: Callable[[], str], every: float = _EVERY_SECONDS
) -> AsyncIterator[bytes]:
    """`events`, and what `say` returns as a comment whenever none has come for a while."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            while not (await asyncio.wait((pending,), timeout=every))[0]:
                yield b": " + say().replace("\n", " ").encode(errors="replace") + b"\n\n"
            try:
                piece = pending.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        if pending is not None:
            pending.cancel()
