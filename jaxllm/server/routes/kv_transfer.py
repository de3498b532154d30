"""Pages for other engines: what they are, a fetch, an acknowledgement. Under the API key, like everything else."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from jaxllm.disaggregation.exchange import Exchange
from jaxllm.disaggregation.exports import Unknown
from jaxllm.disaggregation.peer import FETCH, HANDSHAKE, RELEASE
from jaxllm.schema.fields import Body, Name
from jaxllm.server.context import context_of
from jaxllm.server.errors import ApiError

router = APIRouter()
_MOST_SPANS = 4096
_Index = Annotated[int, Field(ge=0, lt=2**31)]


class FetchRequest(Body):
    """Spans of one request's tokens, and their names."""

    transfer_id: Name
    cache_salt: Annotated[str, Field(max_length=4096)] = ""
    starts: Annotated[list[_Index], Field(min_length=1, max_length=_MOST_SPANS)]
    stops: Annotated[list[_Index], Field(min_length=1, max_length=_MOST_SPANS)]
    names: Annotated[list[Name], Field(min_length=1, max_length=_MOST_SPANS)]


class ReleaseRequest(Body):
    """A request's pages are not wanted any more."""

    transfer_id: Name


@router.get(HANDSHAKE, include_in_schema=False)
async def handshake(request: Request) -> Response:
    """What both sides must agree on."""
    return JSONResponse(_exchange(request).facts)


@router.post(FETCH, include_in_schema=False)
async def fetch(body: FetchRequest, request: Request) -> Response:
    """Rows of keys and values, see `jaxllm.disaggregation.wire`."""
    exchange = _exchange(request)
    try:
        spans = list(zip(body.starts, body.stops, strict=True))
        parts = await asyncio.to_thread(exchange.answer, body.transfer_id, body.cache_salt, spans, body.names)
    except Unknown as error:
        raise ApiError(404, str(error), code="transfer_not_found") from None
    return Response(b"".join(parts), media_type="application/octet-stream")


@router.post(RELEASE, include_in_schema=False)
async def release(body: ReleaseRequest, request: Request) -> Response:
    """Acknowledge: the pages are freed."""
    return JSONResponse({"released": _exchange(request).exports.release(body.transfer_id)})


def _exchange(request: Request) -> Exchange:
    exchange = context_of(request).llm.exchange
    if exchange is None or not exchange.config.gives:
        raise ApiError(404, "this server gives no pages away; start it with --kv-transfer-config", code="not_found")
    return exchange
