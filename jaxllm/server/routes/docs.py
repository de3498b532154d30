"""`GET /docs`: every route in one plain page, made from the OpenAPI document. Nothing is loaded from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

router = APIRouter()
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_STYLE = "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}code{font-size:.95em}"


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The routes, what each takes, and where the whole document is."""
    document = request.app.openapi()
    rows = "".join(_operations(document))
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(document['info']['title'])}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style><h1>Routes</h1>"
        f"<p>The whole document: <a href=openapi.json>openapi.json</a>. A page to chat: <a href=./>here</a>.</p>{rows}"
    )
    return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def _operations(document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            fields = ", ".join(f"<code>{html.escape(name)}</code>" for name in _fields(document, operation))
            about = html.escape(operation.get("description") or operation.get("summary", ""))
            yield f"<h3><code>{method.upper()} {html.escape(path)}</code></h3><p>{about}</p>"
            yield f"<p>Fields: {fields}</p>" if fields else ""


def _fields(document: dict[str, Any], operation: dict[str, Any]) -> list[str]:
    content = operation.get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    return list(document["components"]["schemas"].get(name, {}).get("properties", {}))
