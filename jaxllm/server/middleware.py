"""What every request passes first: an id, the log, the key, the size and time limits of its body.

Plain ASGI around the app. The key is compared in constant time; every route but `/health` needs it, the page too
(browsers send it as the password of HTTP Basic).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxllm.server.errors import ApiError

log = logging.getLogger("jaxllm.access")
_BODY_SECONDS = 60.0
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_OPEN_PATHS = ("/health", "/ping")
_POLLED_PATHS = ("/health", "/ping", "/stats", "/metrics", "/load")  # asked for all the time: only failures are logged
_UPLOADS = ("/v1/files",)


class Gate:
    """Wraps an ASGI app. Paths but `/health` and `/ping` answer 401 without one of `api_keys`, if there are any."""

    def __init__(self, app: Any, *, api_keys: Sequence[str] = (), max_body_bytes: int = 8 << 20):
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let one request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id, started, status = _request_id(headers), time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            await self._pass(scope, headers, receive, send_with_id)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send_with_id)
        except Exception:
            # The app's own handler has answered and logged already, unless nothing was sent.
            if not status:
                log.exception("request %s failed", request_id)
                await ApiError(500, "internal error").response()(scope, receive, send_with_id)
        finally:
            took = round((time.perf_counter() - started) * 1e3, 1)
            entry = {"id": request_id, "method": scope["method"], "path": scope["path"][:200], "status": status}
            quiet = scope["path"] in _POLLED_PATHS and status < 400
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", json.dumps(entry | {"ms": took}))

    @property
    def app(self) -> Any:
        """What lies behind."""
        return self._app

    async def _pass(self, scope: Any, headers: dict[bytes, bytes], receive: Any, send: Any) -> None:
        if self._keys and scope["path"] not in _OPEN_PATHS and not self._known(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": 'Basic realm="jaxllm", charset="UTF-8"'},
            )
        if scope["method"] == "HEAD":  # the answer to GET; the protocol leaves its body out
            scope = {**scope, "method": "GET"}
        if scope["method"] != "POST" or _is_bare(headers):
            await self._app(scope, receive, send)
            return
        media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        wanted = b"multipart/form-data" if scope["path"] in _UPLOADS else b"application/json"
        if media_type != wanted:
            raise ApiError(400, f"the content type must be {wanted.decode()}", code="invalid_content_type")
        body = await self._read_body(headers, receive)
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read_body(self, headers: dict[bytes, bytes], receive: Any) -> bytes:
        limit = self._max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes; send less at once")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the connection closed before the body was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(400, f"the body did not arrive within {_BODY_SECONDS:g} s") from None

    def _known(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        if not (given := headers.get(b"x-api-key", b"")):  # as Anthropic's clients send it
            kinds = {b"bearer": value.strip(), b"basic": _password(value)}
            given = kinds.get(scheme.lower(), b"")
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, whatever the first says
        return any(matches)


def _is_bare(headers: dict[bytes, bytes]) -> bool:
    """Whether a POST has neither a body nor a type of one."""
    return headers.keys().isdisjoint((b"content-type", b"transfer-encoding")) and (
        headers.get(b"content-length", b"0") == b"0"
    )


def _password(value: bytes) -> bytes:
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own, if it is harmless; else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex
