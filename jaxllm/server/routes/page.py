"""The chat page: its files, as they lie in the package. Nothing is loaded from elsewhere."""

from __future__ import annotations

import functools
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from jaxllm.server.errors import ApiError

router = APIRouter()
# What a model wrote cannot run: scripts and styles come from these files alone, and no text is one.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = {"content-security-policy": _POLICY, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_FILES = frozenset(
    [
        *("style.css", "main.js", "api.js", "charts.js", "log.js", "markdown.js", "models.js", "store.js"),
        *("vendor/marked.js", "vendor/purify.js"),
    ]
)


@router.get("/")
async def page() -> Response:
    """A chat box and live charts."""
    return _answer("index.html")


@router.get("/page/{name:path}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """One of the page's files."""
    if name not in _FILES:
        raise ApiError(404, f"the page has no file {name[:100]!r}; its files are {', '.join(sorted(_FILES))}")
    return _answer(name)


def _answer(name: str) -> Response:
    return Response(_content(name), media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)


@functools.cache
def _content(name: str) -> bytes:
    return files("jaxllm.server").joinpath("page", name).read_bytes()
