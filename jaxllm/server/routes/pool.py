"""Models that come, go, sleep and change: `/v1/models/deploy`, `/sleep`, `/running` and their like."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.pool.model import PooledModel, State
from jaxllm.pool.report import model_state, pool_state
from jaxllm.pool.solo import TAGS
from jaxllm.schema.pool_requests import DeployRequest, UndeployRequest, UpdateWeightsRequest
from jaxllm.server.context import Models, context_of
from jaxllm.server.errors import ApiError
from jaxllm.server.pool_models import as_load_error

router = APIRouter()
Tag = Literal["weights", "kv_cache"]


@router.post("/v1/models/deploy")
async def deploy(body: DeployRequest, request: Request) -> Response:
    """Add a model to a pool, and load it; `wait` answers when it is ready."""
    models = _models(request)
    table = body.model_dump(exclude_none=True, exclude={"model", "engine", "wait"}) | (body.engine or {})
    model = await asyncio.to_thread(models.pool.deploy, body.model, table)
    if body.wait:
        await _loaded(models, model)
    return JSONResponse(model_state(model))


@router.post("/v1/models/undeploy")
async def undeploy(body: UndeployRequest, request: Request) -> Response:
    """Take no more requests for a model, and let it go after its last; `wait` answers when it is gone."""
    models = _models(request)
    model = models.find(body.model)
    gone = await asyncio.to_thread(models.pool.undeploy, model.name)
    if body.wait:
        await asyncio.shield(asyncio.wrap_future(gone))
    return JSONResponse(model_state(model) | ({"state": State.ABSENT} if gone.done() else {}))


@router.post("/sleep")
async def sleep(request: Request, level: Annotated[int, Query(ge=1, le=2)] = 1, model: str | None = None) -> Response:
    """Free the devices. In a pool a model's next request wakes it; without a name all but pinned models sleep."""
    ctx = context_of(request)
    if ctx.models is None:
        ctx.check_model(model)
        await ctx.sleeper.sleep(level)
    else:
        pool = ctx.models.pool
        named = [ctx.models.find(model)] if model else [m for m in pool.models if not m.entry.pinned]
        for one in named:
            await asyncio.to_thread(pool.sleep, one.name, level)
    return JSONResponse({"is_sleeping": True})


@router.post("/wake_up")
async def wake_up(
    request: Request, model: str | None = None, tags: Annotated[list[Tag] | None, Query()] = None
) -> Response:
    """Bring a model back onto the devices; a server of one model then takes requests again."""
    ctx = context_of(request)
    if ctx.models is None:
        ctx.check_model(model)
        await ctx.sleeper.wake_up(tags or TAGS)
        return JSONResponse({"is_sleeping": ctx.sleeper.is_sleeping})
    one = ctx.models.find(model)
    await _loaded(ctx.models, one)
    await asyncio.to_thread(ctx.models.pool.wake_up, one.name)
    return JSONResponse({"is_sleeping": False})


@router.get("/is_sleeping")
async def is_sleeping(request: Request, model: str | None = None) -> Response:
    """Whether a model is off the devices; in a pool without a name: whether all are."""
    ctx = context_of(request)
    if ctx.models is None:
        ctx.check_model(model)
        return JSONResponse({"is_sleeping": ctx.sleeper.is_sleeping})
    named = [ctx.models.find(model)] if model else ctx.models.pool.models
    return JSONResponse({"is_sleeping": all(one.place != "device" for one in named)})


@router.post("/update_weights_from_disk")
async def update_weights(body: UpdateWeightsRequest, request: Request) -> Response:
    """Replace a model's weights by others of the same shapes, without compiling; cached prefixes are dropped."""
    ctx = context_of(request)
    if body.flush_cache is False:
        raise ApiError(
            400, "flush_cache false would keep what the old weights computed; leave it out", param="flush_cache"
        )
    if ctx.models is None:
        ctx.check_model(body.model)
        await ctx.sleeper.update_weights(body.model_path)
    else:
        model = ctx.models.find(body.model)
        await _loaded(ctx.models, model)
        await asyncio.to_thread(ctx.models.pool.update_weights, model.name, body.model_path)
    return JSONResponse({"success": True, "message": f"the weights are those of {body.model_path}"})


@router.get("/running")
async def running(request: Request) -> Response:
    """The models that are loaded, where each is, and the latest switches."""
    ctx = context_of(request)
    if ctx.models is None:
        place = "host" if ctx.sleeper.is_sleeping else "device"
        names = ctx.settings.served_model_names
        one = {"model": names[0], "state": State.READY, "place": place, "requests": ctx.llm.num_open}
        return JSONResponse({"running": [one]})
    return JSONResponse(pool_state(ctx.models.pool))


def _models(request: Request) -> Models:
    models = context_of(request).models
    if models is None:
        raise ApiError(400, "this server has one model; start it with --models to deploy others", code="no_pool")
    return models


async def _loaded(models: Models, model: PooledModel) -> None:
    try:
        await asyncio.shield(asyncio.wrap_future(models.pool.ready(model.name)))
    except Exception as error:
        raise as_load_error(model, error) from None
