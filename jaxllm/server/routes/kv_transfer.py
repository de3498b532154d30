"""Pages for other engines: what they are, a fetch, an acknowledgement. Under the API key, like everything else."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from jaxllm.disaggregation.exchange import Exchange
from jaxllm.disaggregation.exports import Unknown
from jaxllm.disaggregation.peer import ENDED, FETCH, HANDSHAKE, RELEASE, RENEW, WAITED
from jaxllm.schema.fields import Body, Name
from jaxllm.server.context import context_of
from jaxllm.server.errors import ApiError

router = APIRouter()
_MOST_SPANS = 4096
_MOST_WAIT_SECONDS = 60.0
_LOOK_SECONDS = 0.003
_Index = Annotated[int, Field(ge=0, lt=2**31)]


class FetchRequest(Body):
    """Spans of one request's tokens, and their names."""

    transfer_id: Name
    cache_salt: Annotated[str, Field(max_length=4096)] = ""
    starts: Annotated[list[_Index], Field(min_length=1, max_length=_MOST_SPANS)]
    stops: Annotated[list[_Index], Field(min_length=1, max_length=_MOST_SPANS)]
    names: Annotated[list[Name], Field(min_length=1, max_length=_MOST_SPANS)]
    wait_seconds: Annotated[float, Field(ge=0, le=_MOST_WAIT_SECONDS)] = 0.0


class RenewRequest(Body):
    """These requests' pages are still wanted."""

    transfer_ids: Annotated[list[Name], Field(min_length=1, max_length=_MOST_SPANS)]


class ReleaseRequest(Body):
    """A request's pages are not wanted any more."""

    transfer_id: Name


@router.get(HANDSHAKE, include_in_schema=False)
async def handshake(request: Request) -> Response:
    """What both sides must agree on."""
    return JSONResponse(_exchange(request).facts)


@router.post(FETCH, include_in_schema=False)
async def fetch(body: FetchRequest, request: Request) -> Response:
    """Rows of keys and values, see `jaxllm.disaggregation.wire`; 202 where they are not computed in the time given."""
    exchange, started = _exchange(request), time.perf_counter()
    try:
        if body.wait_seconds and not await _computed(exchange, body):
            return JSONResponse({"computed": False}, status_code=202)
        waited = time.perf_counter() - started
        spans = list(zip(body.starts, body.stops, strict=True))
        parts = await asyncio.to_thread(exchange.answer, body.transfer_id, body.cache_salt, spans, body.names)
    except Unknown as error:
        raise ApiError(404, str(error), code="transfer_not_found") from None
    ended = exchange.exports.seconds_since_end(body.transfer_id)
    headers = {WAITED: f"{waited:.6f}"} | ({} if ended is None else {ENDED: f"{ended:.6f}"})
    return Response(b"".join(parts), media_type="application/octet-stream", headers=headers)


async def _computed(exchange: Exchange, body: FetchRequest) -> bool:
    """Wait for a prompt, which may not even have arrived. Raises Unknown: in all that time it did not."""
    until, last = time.monotonic() + body.wait_seconds, max(body.stops)
    while not (found := exchange.exports.has(body.transfer_id, last)):
        if time.monotonic() > until:
            if found is None:
                raise Unknown("the request of this transfer_id has not come here")
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


@router.post(RENEW, include_in_schema=False)
async def renew(body: RenewRequest, request: Request) -> Response:
    """A heartbeat: leases begin anew."""
    return JSONResponse({"renewed": _exchange(request).exports.renew(body.transfer_ids)})


@router.post(RELEASE, include_in_schema=False)
async def release(body: ReleaseRequest, request: Request) -> Response:
    """Acknowledge: the pages are freed."""
    return JSONResponse({"released": _exchange(request).exports.release(body.transfer_id)})


def _exchange(request: Request) -> Exchange:
    exchange = context_of(request).llm.exchange
    if exchange is None or not exchange.config.gives:
        raise ApiError(404, "this server gives no pages away; start it with --kv-transfer-config", code="not_found")
    return exchange
