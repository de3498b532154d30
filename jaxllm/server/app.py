"""The app: routes, error shapes and the OpenAPI document, behind the gate."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from jaxllm import __version__
from jaxllm.engine.async_llm import AsyncLLM
from jaxllm.server import chat, completions, embeddings, errors, responses, status, tokens
from jaxllm.server.context import Context, Settings
from jaxllm.server.gate import Gate
from jaxllm.server.metrics import Metrics

_ROUTERS = (completions, chat, responses, embeddings, tokens, status)
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def make_app(llm: AsyncLLM, settings: Settings) -> Gate:
    """The ASGI app that serves `llm`."""
    app = FastAPI(title="jaxllm", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(llm, settings.served_model_names[0], settings.metrics_namespace)
    app.state.context = Context(llm=llm, settings=settings, metrics=metrics)
    for module in _ROUTERS:
        app.include_router(module.router)
    errors.install(app)
    build = app.openapi
    app.openapi = lambda: _with_errors(build())
    return Gate(app, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes)


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    """Say what errors look like: FastAPI would announce its own 422."""
    document["components"] = document.get("components") or {}
    schemas = document["components"].setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Error"] = _ERROR_SCHEMA
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {"description": "An error", "content": content}
            ok = operation["responses"].get("200", {})
            if operation["operationId"].startswith(("metrics", "page")):
                kind = "text/plain" if operation["operationId"].startswith("metrics") else "text/html"
                ok["content"] = {kind: {"schema": {"type": "string"}}}
    return document
