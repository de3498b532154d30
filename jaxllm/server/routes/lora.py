"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`: adapters come and go while others answer (vLLM's)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from jaxllm.adapters.peft import CONFIG_FILE
from jaxllm.adapters.store import UnknownAdapter
from jaxllm.schema.requests import LoadAdapterRequest, UnloadAdapterRequest
from jaxllm.server.context import Context, context_of
from jaxllm.server.errors import ApiError

router = APIRouter()


def _single(request: Request) -> Context:
    """The context of one model. Raises ApiError in a pool: its models come and go, adapters with them."""
    ctx = context_of(request)
    if ctx.models is not None:
        raise ApiError(400, "a pool's adapters come with their model; give lora_modules to /v1/models/deploy")
    return ctx


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadAdapterRequest, request: Request) -> Response:
    """Serve the adapter of a folder of the server's machine under a name."""
    ctx = _single(request)
    if body.lora_name in ctx.settings.served_model_names:
        raise ApiError(400, f"the model itself is called {body.lora_name!r}; give another name", param="lora_name")

    def load() -> None:
        ctx.llm.adapters.load(body.lora_name, body.lora_path, replace=bool(body.load_inplace))

    try:
        await ctx.llm.in_thread(load)
    except ValueError as error:
        if f"no {CONFIG_FILE}" in str(error):
            raise ApiError(404, str(error), param="lora_path") from None
        raise
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadAdapterRequest, request: Request) -> Response:
    """Serve it no more; requests that have it go on to their end."""
    try:
        _single(request).llm.adapters.unload(body.lora_name)
    except UnknownAdapter as error:
        raise ApiError(404, str(error), param="lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
