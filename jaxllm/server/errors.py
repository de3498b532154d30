"""Errors as clients see them: `{"error": {"message", "type", "param", "code"}}` at every status.

A message says what was wrong and what to do; it never carries internals. Those go to the log with the request id.
"""

from __future__ import annotations

import difflib
import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxllm.engine.errors import EngineError, NotFinite, Unavailable
from jaxllm.pool.budget import NoRoom
from jaxllm.schema.validation import explain

log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 500: "internal_error"}
_ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_UNREADABLE = "the body cannot be read as JSON; send UTF-8, less nesting and numbers of fewer than 4300 digits"


class ApiError(Exception):
    """What a client did wrong or what the server cannot do, with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers
        self.code = code or _CODES.get(status, "invalid_value")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that goes out."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        """The same as clients of Anthropic's API read it; OpenAI's keys stay beside."""
        kind = _ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": self.body["error"] | {"type": kind}}

    def response(self, path: str = "") -> Response:
        """As a plain response to a request of `path`."""
        body = self.anthropic_body if path.startswith(_ANTHROPIC_PATH) else self.body
        return JSONResponse(body, self.status, self.headers)

    def event(self) -> bytes:
        """As the last events of a stream."""
        return b"event: error\ndata: " + json.dumps(self.body).encode() + b"\n\ndata: [DONE]\n\n"


def as_api_error(error: Exception) -> ApiError:
    """Whatever went wrong, as something that may be shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, NoRoom):
        return ApiError(507, str(error), code="no_room")
    if isinstance(error, ConnectionResetError):  # the client went away: nobody reads this
        return ApiError(400, str(error))
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, NotFinite):
        return ApiError(500, str(error), code="not_finite")
    if isinstance(error, TimeoutError):
        return ApiError(503, "the request took longer than the server allows", code="timeout")
    if isinstance(error, ValueError):
        too_long = "leaves no room for an answer" in str(error)
        return ApiError(400, str(error)[:1000], code="context_length_exceeded" if too_long else None)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the log has the details under this request's id")


def install(app: FastAPI) -> None:
    """Answer every exception in the documented shape."""

    async def on_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response(request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        if error.status_code in (400, 422):  # raised where a body cannot even be decoded
            return ApiError(400, _UNREADABLE, code="invalid_json").response(request.url.path)
        return ApiError(
            error.status_code, _misplaced(error, request, list(app.openapi()["paths"])), headers=headers
        ).response(request.url.path)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response(request.url.path)

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, Unavailable, NoRoom, ConnectionResetError, EngineError, TimeoutError, ValueError, Exception):
        app.add_exception_handler(kind, on_error)


def _misplaced(error: HTTPException, request: Request, paths: list[str]) -> str:
    """Which path or method to use instead."""
    method, path = request.method, request.url.path
    if error.status_code == 405:
        return f"{method} is not allowed on {path[:100]!r}; use {(error.headers or {}).get('Allow', 'another method')}"
    if error.status_code != 404:
        return str(error.detail)
    close = difflib.get_close_matches(path[:200], paths, n=1, cutoff=0.75)
    hint = f"did you mean {close[0]!r}?" if close else "/openapi.json lists the routes there are"
    return f"there is no route {path[:100]!r}; {hint}"


def _invalid(error: RequestValidationError) -> ApiError:
    """The complaint that helps most."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        problem = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return ApiError(400, f"the body is not valid JSON: {problem}; correct it", code="invalid_json")
    message, param = explain(error.errors(), error.body)
    return ApiError(400, message, param=param)
