"""The app: routes and error shapes behind the gate."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.pool.face import PoolFace
from jaxllm.pool.solo import Sleeper
from jaxllm.server import errors
from jaxllm.server.context import Context, CrossOrigin, Settings
from jaxllm.server.middleware import Gate
from jaxllm.server.openapi import complete
from jaxllm.server.pool_models import PoolModels
from jaxllm.server.prometheus import Families
from jaxllm.server.routes import (
    batches,
    chat,
    completions,
    docs,
    embeddings,
    kv_transfer,
    lora,
    messages,
    page,
    pool,
    relevance,
    responses,
    status,
    tokens,
)
from jaxllm.version import __version__

_ROUTERS = (
    completions,
    chat,
    responses,
    messages,
    embeddings,
    relevance,
    lora,
    tokens,
    batches,
    kv_transfer,
    pool,
    status,
    docs,
    page,
)


def make_app(llm: AsyncLLM | PoolFace, settings: Settings) -> Any:
    """The ASGI app that serves `llm`, one model or a pool of them."""
    app = FastAPI(title="jaxllm", version=__version__, docs_url=None, redoc_url=None)
    app.state.context = _context(llm, settings)
    for module in _ROUTERS:
        app.include_router(module.router)
    errors.install(app)
    build = app.openapi
    app.openapi = lambda: complete(build(), app.state.context)
    gate = Gate(app, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes)
    return _cross_origin(gate, settings.cross_origin)


def _context(llm: Any, settings: Settings) -> Context:
    families = Families(settings.metrics_namespace)
    if not isinstance(llm, PoolFace):
        metrics = families.of(llm, settings.served_model_names[0])
        return Context(llm=llm, settings=settings, metrics=metrics, sleeper=Sleeper(llm))
    models = PoolModels(llm.pool, families)
    return Context(llm=llm, settings=settings, metrics=models.metrics, models=models, sleeper=Sleeper(llm))  # type: ignore[arg-type]


def _cross_origin(app: Any, allowed: CrossOrigin) -> Any:
    """Answers of pages of other origins, before the key is asked for: browsers send none with their first question."""
    if not allowed.origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed.origins,
        allow_methods=allowed.methods,
        allow_headers=allowed.headers,
        allow_credentials=allowed.credentials,
        expose_headers=("x-request-id", "x-jaxllm-warning", "retry-after"),
    )
