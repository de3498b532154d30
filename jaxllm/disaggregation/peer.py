"""One other server, as far as its pages go: handshake, fetch, acknowledgement, over its own HTTP port and API key.

The standard library's HTTP client, for threads. Every call is bounded in time; what goes wrong is a `PeerError` with a
sentence.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HANDSHAKE, FETCH = "/kv_transfer/handshake", "/kv_transfer/fetch"
RENEW, RELEASE = "/kv_transfer/renew", "/kv_transfer/release"
WAITED, ENDED = "kv-waited-seconds", "kv-ended-seconds"  # headers of a fetch's answer
_PIECE = 1 << 20


class PeerError(Exception):
    """The other side cannot be reached, refuses, or answers nonsense."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The answer to a fetch.

    Attributes:
        content: the encoded rows.
        waited: seconds that the other side waited for them to be computed.
        ended: on this side's performance clock, when the prompt's request ended there; None: it had not.
    """

    content: bytes
    waited: float
    ended: float | None


class Peer:
    """A server at `host:port`; connections are kept, one for each thread."""

    def __init__(self, host: str, port: int, *, timeout: float, api_key: str | None):
        self.host, self.port, self._timeout = host, port, timeout
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._local = threading.local()
        self._connections: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        """Close every connection; for the end."""
        for connection in self._connections:
            connection.close()

    def handshake(self) -> dict[str, Any]:
        """What the other side says of itself."""
        facts = json.loads(self._call("GET", HANDSHAKE, None)[-1])
        if not isinstance(facts, dict):
            raise PeerError(f"{self.host}:{self.port} answers the handshake with something else")
        return facts

    def fetch(
        self,
        transfer_id: str,
        salt: str,
        spans: Sequence[tuple[int, int]],
        names: Sequence[str],
        wait_seconds: float = 0.0,
    ) -> Fetched | None:
        """The encoded rows of these spans; None: not computed within `wait_seconds`."""
        starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
        asked = {"starts": starts, "stops": stops, "names": list(names), "wait_seconds": wait_seconds}
        response, began, content = self._call("POST", FETCH, {"transfer_id": transfer_id, "cache_salt": salt, **asked})
        if response.status != 200:
            return None
        ended = response.getheader(ENDED)
        return Fetched(
            content, float(response.getheader(WAITED) or 0.0), None if ended is None else began - float(ended)
        )

    def renew(self, transfer_ids: Sequence[str]) -> None:
        """Tell that these requests' pages are still wanted."""
        self._call("POST", RENEW, {"transfer_ids": list(transfer_ids)})

    def release(self, transfer_id: str) -> None:
        """Tell that its pages are not wanted any more."""
        self._call("POST", RELEASE, {"transfer_id": transfer_id})

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPResponse, float, bytes]:
        """An answer, when it began, and its content."""
        text = None if body is None else json.dumps(body)
        deadline = time.monotonic() + self._timeout
        for attempt in (0, 1):  # a connection that was kept may have been closed there meanwhile
            connection = self._connection(anew=attempt > 0)
            try:
                connection.request(method, path, text, self._headers)
                response, began = connection.getresponse(), time.perf_counter()
                content = _content(response, deadline)
            except TimeoutError:
                connection.close()
                raise PeerError(f"{self.host}:{self.port} did not answer within {self._timeout:g} s") from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if attempt:
                    raise PeerError(f"{self.host}:{self.port} cannot be reached: {error}") from None
                continue
            if response.status not in (200, 202):
                raise PeerError(f"{self.host}:{self.port} refuses: {_message(content, response.status)}")
            return response, began, content
        raise AssertionError("the second attempt returns or raises")

    def _connection(self, *, anew: bool) -> http.client.HTTPConnection:
        known = getattr(self._local, "connection", None)
        if known is None or anew:
            if known is not None:
                self._connections.remove(known)
            known = http.client.HTTPConnection(self.host, self.port, timeout=self._timeout)
            self._local.connection = known
            self._connections.append(known)
        return known


def _content(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """All of an answer; a socket's own timeout would begin anew with every piece. Raises TimeoutError."""
    pieces = []
    while piece := response.read(_PIECE):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)


def _message(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
