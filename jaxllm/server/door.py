"""The ASGI app of a server from its first moment: it says that the server loads until the real app is there."""

from __future__ import annotations

from typing import Any, final

from fastapi.responses import JSONResponse, PlainTextResponse, Response

from jaxllm.server.errors import ApiError

_SECONDS = 5  # after which to ask again


@final
class Door:
    """Answers 503 to everything, with `status: loading` and what is being done, until `open` is called."""

    def __init__(self) -> None:
        self.stage = "starting"
        self._app: Any = None

    def open(self, app: Any) -> None:
        """Let every request through to `app` from now on."""
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request."""
        if self._app is not None:
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} here")
        await self._answer(scope)(scope, receive, send)

    def _answer(self, scope: Any) -> Response:
        headers = {"retry-after": str(_SECONDS)}
        error = ApiError(503, f"the server is loading: {self.stage}; ask again soon", code="loading")
        if any(name == b"accept" and b"text/html" in value for name, value in scope["headers"]):
            # A browser that opens the page early sees it as soon as it is there.
            again = {"refresh": str(_SECONDS), "content-security-policy": "default-src 'none'"}
            return PlainTextResponse(str(error), 503, headers | again)
        return JSONResponse({"status": "loading", "stage": self.stage, **error.body}, 503, headers)
