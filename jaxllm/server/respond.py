"""One request of a generating route, from its body to a whole answer or a stream of events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from jaxllm.server.context import Context, Models, context_of, model_context, request_id_of
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Generation
from jaxllm.server.streaming import EventStream, failed_event, unless_disconnected
from jaxllm.server.waiting import with_comments


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
    request_id = getattr(body, "request_id", None) or request_id_of(request)
    models = context_of(request).models
    _set_keep_alive(models, body)
    if body.stream and models is not None and not models.is_ready(body.model):
        return _stream_when_loaded(request, body, make, request_id, models, failed)
    if body.stream:
        ctx, model = await model_context(request, body.model)
        call = make(ctx, body, model, request_id)
        generation = await call.start()
        events = call.events(generation)
        if models is not None:
            events = with_comments(events, lambda: models.waiting_for(body.model))
        return EventStream(events, generation.close, _warnings(generation), failed=failed)

    async def whole() -> tuple[dict[str, Any], Generation]:
        ctx, model = await model_context(request, body.model)
        call = make(ctx, body, model, request_id)
        generation = await call.start()
        return await call.answer(generation), generation

    answer, generation = await unless_disconnected(request, whole())
    return JSONResponse(answer, headers=_warnings(generation))


def _set_keep_alive(models: Models | None, body: Any) -> None:
    """Ollama's `keep_alive` of a request: how long its model stays on the device afterwards."""
    if (duration := getattr(body, "keep_alive", None)) is None:
        return
    if models is None:
        raise ApiError(400, "keep_alive is for a server of several models (--models); leave it out", param="keep_alive")
    models.pool.keep_alive(models.find(body.model).name, duration)


def _stream_when_loaded(
    request: Request,
    body: Any,
    make: MakeCall,
    request_id: str,
    models: Models,
    failed: Callable[[Exception], bytes],
) -> Response:
    """A stream that begins at once: comments say how far the model is, then comes the answer, or an error event."""
    opened: list[Generation] = []

    async def events() -> AsyncIterator[bytes]:
        ctx, model = await model_context(request, body.model)
        call = make(ctx, body, model, request_id)
        opened.append(await call.start())
        async for piece in call.events(opened[0]):
            yield piece

    def close() -> None:
        for generation in opened:
            generation.close()

    return EventStream(with_comments(events(), lambda: models.waiting_for(body.model)), close, failed=failed)


def _warnings(generation: Generation) -> dict[str, str]:
    """What was asked for and is not enforced, as a header; text beyond Latin-1 is escaped."""
    texts = "; ".join(dict.fromkeys(text for output in generation.outputs for text in output.warnings))
    return {"x-jaxllm-warning": texts[:1000].encode("ascii", "backslashreplace").decode()} if texts else {}
