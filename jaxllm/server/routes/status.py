"""What the server tells of itself: models, health, metrics, version, and the figures of the page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.pool.model import PooledModel, State
from jaxllm.schema.answers import ModelCard, ModelList, answered
from jaxllm.server.context import Context, context_of, model_context
from jaxllm.server.errors import ApiError
from jaxllm.server.prometheus import CONTENT_TYPE
from jaxllm.server.routes.tokens import max_model_len
from jaxllm.version import __version__

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests are taken; 503 when the engine is dead, stuck or draining.

    With `warming_up` some programs still compile; a request that needs one of them waits for it.
    """
    llm = context_of(request).llm
    if (reason := llm.unavailable()) is not None:
        raise ApiError(503, reason, code="unhealthy", headers={"retry-after": "10"})
    warm_up = llm.warm_up
    if warm_up is None or warm_up.is_over:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "ok", "warming_up": f"{warm_up.done} of {warm_up.total} programs"})


@router.get("/ping")
@router.post("/ping", include_in_schema=False)
async def ping(request: Request) -> Response:
    """The same, under the name that hosts of containers ask for."""
    return await health(request)


@router.get("/load")
async def load(request: Request) -> Response:
    """Requests that are accepted and unfinished, as vLLM names them."""
    return JSONResponse({"server_load": context_of(request).llm.num_open})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """What evaluation tools need to know of the tokenizer: its special tokens and chat template."""
    ctx, _ = await model_context(request, model)
    tokenizer = ctx.llm.get_tokenizer()
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"))
    return JSONResponse(names | tokenizer.special_tokens | known | {"model_max_length": max_model_len(ctx)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(context_of(request).metrics.families.exposition(), media_type=CONTENT_TYPE)


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
    """Every name this server answers to, adapters' too, and how far each model is."""
    ctx = context_of(request)
    if ctx.models is not None:
        cards = [card for model in ctx.models.pool.models for card in _cards_of_pool(ctx, model)]
    else:
        names = [*ctx.settings.served_model_names, *(entry.name for entry in ctx.llm.adapters.served)]
        cards = [_card(ctx, name) for name in names]
    return JSONResponse({"object": "list", "data": cards})


@router.get("/v1/models/{name:path}", responses=answered(ModelCard))
async def model(name: str, request: Request) -> Response:
    """One of them."""
    ctx = context_of(request)
    if ctx.models is not None:
        cards = _cards_of_pool(ctx, ctx.models.find(name))
        return JSONResponse(next((card for card in cards if card["id"] == name), cards[0]))
    return JSONResponse(_card(ctx, ctx.check_model(name)))


def _card(ctx: Context, name: str) -> dict:
    base, config = ctx.settings.served_model_names[0], ctx.llm.model_config
    adapter = next((entry for entry in ctx.llm.adapters.served if entry.name == name), None)
    root, parent = (base, None) if adapter is None else (adapter.path or name, base)
    own = {"parent": parent, "max_model_len": max_model_len(ctx), "vocab_size": config.vocab_size}
    return _described(ctx, name, root) | own


def _cards_of_pool(ctx: Context, model: PooledModel) -> list[dict]:
    """A model and its adapters; lengths are known when it is loaded."""
    llm = model.llm
    known = (llm.engine.runner.shapes.max_model_len, llm.model_config.vocab_size) if llm is not None else (None, None)
    sizes = {"max_model_len": known[0], "vocab_size": known[1]}
    own = sizes | {"state": model.state, "place": model.place}
    adapters = model.entry.lora_modules.items()
    return [
        _described(ctx, model.name, model.entry.path) | own,
        *(_described(ctx, name, path) | own | {"parent": model.name} for name, path in adapters),
    ]


def _described(ctx: Context, name: str, root: str) -> dict:
    own = {"id": name, "object": "model", "created": ctx.started, "owned_by": "jaxllm", "root": root}
    return own | {"parent": None, "state": State.READY}
