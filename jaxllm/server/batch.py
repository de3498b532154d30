"""Requests as lines of a file: each is answered by the app as if it had come over HTTP, many at a time.

The format is OpenAI's and vLLM's: `{"custom_id", "method", "url", "body"}` in, `{"id", "custom_id", "response",
"error"}` out, in the order of the input. Knows no route by name but for those that it may call.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
)
_LOWEST_PRIORITY = 1000  # whoever waits for an answer goes first
_MAX_LINE = 8 << 20


async def answers(app: Any, lines: Iterable[str], *, most: int, endpoint: str | None = None) -> AsyncIterator[str]:
    """One line of JSON per line of input that is not blank.

    Args:
        app: the ASGI app behind the gate.
        lines: requests.
        most: how many are under way at once.
        endpoint: the only route that they may name; None: any of `ENDPOINTS`.
    """
    under_way: deque[asyncio.Task[str]] = deque()
    try:
        for line in lines:
            if not line.strip():
                continue
            under_way.append(asyncio.ensure_future(_answer(app, line, (endpoint,) if endpoint else ENDPOINTS)))
            if len(under_way) >= most:
                yield await under_way.popleft()
        while under_way:
            yield await under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()


async def _answer(app: Any, line: str, endpoints: tuple[str, ...]) -> str:
    request_id = uuid.uuid4().hex
    given: Any = None
    try:
        given = json.loads(line) if len(line) <= _MAX_LINE else None
        path, body = _checked(given, endpoints)
    except ValueError as error:
        message = {"message": f"the line is no request: {error}", "type": "invalid_request_error", "param": None}
        status, answer = 400, {"error": message | {"code": "invalid_line"}}
    else:
        status, answer = await _post(app, path, body, request_id)
    custom_id = given.get("custom_id") if isinstance(given, dict) else None
    response = {"status_code": status, "request_id": request_id, "body": answer}
    error = None if status == 200 else answer.get("error")
    out = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(out, ensure_ascii=False)


def _checked(given: Any, endpoints: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    if not isinstance(given, dict) or not isinstance(given.get("body"), dict):
        raise ValueError('expected {"custom_id", "method": "POST", "url", "body": {...}}')
    if given.get("method", "POST") != "POST":
        raise ValueError(f"its method is {str(given['method'])[:20]!r}; only POST is understood")
    path = str(given.get("url", ""))
    if path not in endpoints:
        raise ValueError(f"its url is {path[:100]!r}; expected {' or '.join(endpoints)}")
    if given["body"].get("stream"):
        raise ValueError("it asks for a stream; leave stream out")
    return path, given["body"]


async def _post(app: Any, path: str, body: dict[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
    """The status and JSON that the app answers with."""
    if path != "/v1/embeddings":
        body = {"priority": _LOWEST_PRIORITY, **body}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": {"request_id": request_id},
    }
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    status, parts = 500, []

    async def receive() -> Any:
        if incoming:
            return incoming.pop()
        await asyncio.Event().wait()  # the client never goes away

    async def send(message: Any) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # answered and logged by the app's own handler
        if not parts:
            return 500, {"error": {"message": "internal error", "type": "server_error", "param": None, "code": None}}
    return status, json.loads(b"".join(parts))
