"""A small HTTP client that times server-sent events; asyncio only, so that it costs little beside the server.

One request per connection. Knows chunked and plain bodies; nothing of what the events mean.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_MAX_LINE = 1 << 22


class HttpError(RuntimeError):
    """A status other than 200, or a broken answer."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a server is and how to get in."""

    base_url: str
    api_key: str | None = None

    async def get(self, path: str) -> Any:
        """The JSON at `path`."""
        return json.loads(b"".join([line async for line in self._lines("GET", path, b"")]))

    async def text(self, path: str) -> str:
        """The text at `path`."""
        return "\n".join([line.decode(errors="replace") async for line in self._lines("GET", path, b"")])

    async def events(self, path: str, body: Any) -> AsyncIterator[tuple[float, Any]]:
        """Arrival time (`time.perf_counter`) and JSON of every event until `[DONE]`."""
        async for line in self._lines("POST", path, json.dumps(body).encode()):
            if not line.startswith(b"data: "):
                continue
            data = line[6:].strip()
            if data == b"[DONE]":
                return
            yield time.perf_counter(), json.loads(data)

    async def _lines(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"--base-url is {self.base_url!r}; it must look like http://127.0.0.1:8000")
        context = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if context else 80)
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=context, limit=_MAX_LINE)
        try:
            writer.write(self._head(method, url.path.rstrip("/") + path, url.netloc, len(body)) + body)
            chunked = await _read_head(reader)
            async for line in _body_lines(reader, chunked):
                yield line
        finally:
            writer.close()

    def _head(self, method: str, path: str, host: str, length: int) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {length}"]
        lines += ["Content-Type: application/json"] if method == "POST" else []
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode()


async def _read_head(reader: asyncio.StreamReader) -> bool:
    """Whether the body is chunked. Raises HttpError for any status but 200."""
    status = (await reader.readline()).split()
    chunked, length = False, 0
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        chunked |= name.lower() == "transfer-encoding" and "chunked" in value.lower()
        length = int(value) if name.lower() == "content-length" else length
    if len(status) < 2 or status[1] != b"200":
        text = (await reader.read(min(length, 2000))).decode(errors="replace")
        raise HttpError(f"status {status[1].decode() if len(status) > 1 else 'missing'}: {text[:200]}")
    return chunked


async def _body_lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    held = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            data = (await reader.readexactly(size + 2))[:-2] if size else b""
        else:
            data = await reader.read(1 << 16)
        if not data:
            if held:
                yield held
            return
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            yield line
