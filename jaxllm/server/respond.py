"""One request of a generating route, from its body to a whole answer or a stream of events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from jaxllm.server.context import Context, context_of, request_id_of
from jaxllm.server.generation import Generation
from jaxllm.server.streaming import EventStream, failed_event, unless_disconnected


class Call(Protocol):
    """What each API makes of a request; made anew for each one."""

    async def start(self) -> Generation:
        """Prepare the prompt and open the generation."""
        ...

    async def answer(self, generation: Generation) -> dict[str, Any]:
        """The whole answer."""
        ...

    def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The answer as encoded events."""
        ...


class MakeCall(Protocol):
    """Makes the call of one request. Raises ApiError or ValueError where the request cannot be carried out."""

    def __call__(self, ctx: Context, body: Any, model: str, request_id: str) -> Call: ...


async def respond(
    request: Request, body: Any, make: MakeCall, *, failed: Callable[[Exception], bytes] = failed_event
) -> Response:
    """Answer `body` (any request class with `model` and `stream`), whole or streamed; `failed` ends a stream."""
    ctx = context_of(request)
    model = ctx.check_model(body.model)
    call = make(ctx, body, model, getattr(body, "request_id", None) or request_id_of(request))
    if body.stream:
        generation = await call.start()
        return EventStream(call.events(generation), generation.close, _warnings(generation), failed=failed)

    async def whole() -> tuple[dict[str, Any], Generation]:
        generation = await call.start()
        return await call.answer(generation), generation

    answer, generation = await unless_disconnected(request, whole())
    return JSONResponse(answer, headers=_warnings(generation))


def _warnings(generation: Generation) -> dict[str, str]:
    """What was asked for and is not enforced, as a header; text beyond Latin-1 is escaped."""
    texts = "; ".join(dict.fromkeys(text for output in generation.outputs for text in output.warnings))
    return {"x-jaxllm-warning": texts[:1000].encode("ascii", "backslashreplace").decode()} if texts else {}
