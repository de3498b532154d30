"""What the server tells of itself: models, health, metrics, version, and the figures of the page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm import __version__
from jaxllm.server.context import context_of
from jaxllm.server.errors import ApiError
from jaxllm.server.prometheus import CONTENT_TYPE
from jaxllm.server.routes.tokens import max_model_len
from jaxllm.server.schema.answers import ModelCard, ModelList, answered

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 when the engine is dead, stuck or draining."""
    reason = context_of(request).llm.unavailable()
    if reason is not None:
        raise ApiError(503, reason, code="unhealthy", headers={"retry-after": "10"})
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(context_of(request).metrics.exposition(), media_type=CONTENT_TYPE)


@router.get("/stats")
async def stats(request: Request) -> Response:
    """The same figures as JSON, for the page."""
    return JSONResponse(context_of(request).metrics.snapshot())


@router.get("/version")
async def version() -> Response:
    """The version of jaxllm."""
    return JSONResponse({"version": __version__})


@router.get("/v1/models", responses=answered(ModelList))
async def models(request: Request) -> Response:
    """Every name this server answers to."""
    names = context_of(request).settings.served_model_names
    return JSONResponse({"object": "list", "data": [_card(request, name) for name in names]})


@router.get("/v1/models/{name:path}", responses=answered(ModelCard))
async def model(name: str, request: Request) -> Response:
    """One of them."""
    return JSONResponse(_card(request, context_of(request).check_model(name)))


def _card(request: Request, name: str) -> dict:
    ctx = context_of(request)
    return {
        "id": name,
        "object": "model",
        "created": ctx.started,
        "owned_by": "jaxllm",
        "root": ctx.settings.served_model_names[0],
        "max_model_len": max_model_len(request),
        "vocab_size": ctx.llm.model_config.vocab_size,
    }
