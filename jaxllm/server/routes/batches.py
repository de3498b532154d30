"""`/v1/files` and `/v1/batches`: many requests in a file, answered when nobody waits for others."""

from __future__ import annotations

import email.parser
import email.policy
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.schema.requests import BatchRequest
from jaxllm.server.context import Context, context_of
from jaxllm.server.errors import ApiError
from jaxllm.server.file_store import Batch, StoredFile

router = APIRouter()
_MAX_BATCHES = 1000


@router.post("/v1/files", include_in_schema=False)
async def upload(request: Request) -> Response:
    """Keep a file: the form's `file`, for the form's `purpose`."""
    parts = _parts(request.headers.get("content-type", ""), await request.body())
    if "file" not in parts:
        raise ApiError(400, "the form has no file; send it as the part 'file'", param="file")
    filename, content = parts["file"]
    purpose = parts.get("purpose", ("", b"batch"))[1].decode("utf-8", "replace")[:64]
    file = StoredFile(content=content, filename=filename[:256] or "file", purpose=purpose)
    return JSONResponse(context_of(request).files.add(file).shaped())


def _parts(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Name to file name and content, of a form."""
    head = b"content-type: " + content_type.encode("latin-1") + b"\r\n\r\n"
    form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    parts: dict[str, tuple[str, bytes]] = {}
    for part in form.iter_parts() if form.is_multipart() else ():
        name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            parts[name] = (part.get_filename() or "", content)
    return parts


@router.get("/v1/files")
async def list_files(request: Request) -> Response:
    """Every file that is kept."""
    return JSONResponse(_list([file.shaped() for file in context_of(request).files.all()]))


@router.get("/v1/files/{file_id}")
async def file(file_id: str, request: Request) -> Response:
    """One file's description."""
    return JSONResponse(context_of(request).files.get(file_id).shaped())


@router.get("/v1/files/{file_id}/content", include_in_schema=False)
async def content(file_id: str, request: Request) -> Response:
    """One file itself."""
    return Response(context_of(request).files.get(file_id).content, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}")
async def remove(file_id: str, request: Request) -> Response:
    """Forget a file."""
    context_of(request).files.remove(file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


@router.post("/v1/batches")
async def create(body: BatchRequest, request: Request) -> Response:
    """Answer every request of a file."""
    ctx = context_of(request)
    if len(ctx.batches) >= _MAX_BATCHES:
        del ctx.batches[next(iter(ctx.batches))]
    batch = Batch(body.endpoint, ctx.files.get(body.input_file_id), body.completion_window, body.metadata)
    ctx.batches[batch.id] = batch
    batch.start(request.app, ctx.files, most=_most_at_once(ctx))
    return JSONResponse(batch.shaped())


@router.get("/v1/batches")
async def list_batches(request: Request) -> Response:
    """Every batch, the newest first."""
    return JSONResponse(_list([batch.shaped() for batch in reversed(context_of(request).batches.values())]))


@router.get("/v1/batches/{batch_id}")
async def batch(batch_id: str, request: Request) -> Response:
    """How far one has come."""
    return JSONResponse(_batch(context_of(request), batch_id).shaped())


@router.post("/v1/batches/{batch_id}/cancel", include_in_schema=False)
async def cancel(batch_id: str, request: Request) -> Response:
    """End one."""
    found = _batch(context_of(request), batch_id)
    found.cancel()
    return JSONResponse(found.shaped())


def _most_at_once(ctx: Context) -> int:
    llms = [ctx.llm] if ctx.models is None else [m.llm for m in ctx.models.pool.models if m.llm is not None]
    return max((llm.engine.runner.shapes.spare_slot for llm in llms), default=8)


def _batch(ctx: Context, batch_id: str) -> Batch:
    if batch_id not in ctx.batches:
        raise ApiError(404, f"there is no batch {batch_id[:100]!r}; /v1/batches lists them")
    return ctx.batches[batch_id]


def _list(entries: list[dict[str, Any]]) -> dict[str, Any]:
    ends = {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {}
    return {"object": "list", "data": entries, "has_more": False, **ends}
