"""Errors as clients see them: `{"error": {"message", "type", "param", "code"}}` at every status.

A message says what was wrong and what to do; it never carries internals. Those go to the log with the request id.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from jaxllm.engine.async_llm import Unavailable
from jaxllm.engine.engine_thread import EngineError

log = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 500: "internal_error"}


class ApiError(Exception):
    """What a client did wrong or what the server cannot do, with its status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers
        self.code = code or _CODES.get(status, "invalid_value")

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that goes out."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """As a plain response."""
        return JSONResponse(self.body, self.status, self.headers)

    def event(self) -> bytes:
        """As the last events of a stream."""
        return b"event: error\ndata: " + json.dumps(self.body).encode() + b"\n\ndata: [DONE]\n\n"


def as_api_error(error: Exception) -> ApiError:
    """Whatever went wrong, as something that may be shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, ConnectionResetError):  # the client went away: nobody reads this
        return ApiError(400, str(error))
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, TimeoutError):
        return ApiError(503, "the request took longer than the server allows", code="timeout")
    if isinstance(error, ValueError):
        too_long = "leaves no room for an answer" in str(error)
        return ApiError(400, str(error)[:1000], code="context_length_exceeded" if too_long else None)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "internal error; the log has the details under this request's id")


def install(app: FastAPI) -> None:
    """Answer every exception in the documented shape."""

    async def on_error(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        status = 400 if error.status_code == 422 else error.status_code
        return ApiError(status, str(error.detail), headers=headers).response()

    async def on_invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, Unavailable, ConnectionResetError, EngineError, TimeoutError, ValueError, Exception):
        app.add_exception_handler(kind, on_error)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first complaint, without the value (it may be long, or a secret)."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    where = ".".join(part for part in path if part.isidentifier() or part.isdigit())[:200]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
    return ApiError(400, message[:1000], param=where or None)
