"""The models of a pool as routes see them: a request's model by name, loaded where it must be, with its own context."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, final

from jaxllm.engine.errors import Unavailable
from jaxllm.pool.budget import NoRoom
from jaxllm.pool.model import PooledModel, State
from jaxllm.pool.pool import Pool, UnknownModel
from jaxllm.pool.report import pool_figures, pool_state
from jaxllm.server.errors import ApiError
from jaxllm.server.prometheus import Families

if TYPE_CHECKING:
    from fastapi import Request

    from jaxllm.server.context import Context

_SUMMED = (
    "generation_tokens_total",
    "prompt_tokens_total",
    "num_requests_running",
    "num_requests_waiting",
    "num_preemptions",
    "compilations",
)
_WORST = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "kv_cache_usage_perc", "prefix_cache_hit_rate")
_GUESSED_LOAD_SECONDS = 5.0
_TIMEOUT_HEADERS = ("x-request-timeout", "x-stainless-read-timeout", "x-stainless-timeout")  # the last two: OpenAI's


@final
class PoolModels:
    """One per app.

    Args:
        pool: whose models they are.
        families: the metrics of all models.
    """

    def __init__(self, pool: Pool, families: Families):
        self.pool, self.families = pool, families
        self._contexts: dict[str, Context] = {}
        self.metrics = PoolMetrics(self)
        families.add(lambda: pool_figures(pool))

    @property
    def contexts(self) -> list[Context]:
        """Of models that requests have come for."""
        return list(self._contexts.values())

    def find(self, name: str | None) -> PooledModel:
        """The model of a name, an alias, or (no name) the first. Raises ApiError."""
        models = self.pool.models
        if not name and models:
            return models[0]
        try:
            return self.pool.model(name or "")
        except UnknownModel as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from None

    def is_ready(self, name: str | None) -> bool:
        """Whether a request of this model need not wait for it to be loaded."""
        model = self.find(name)
        return model.loaded is not None and model.loaded.done()

    async def choose(self, base: Context, name: str | None, request: Request) -> tuple[Context, str]:
        """The context of a request's model, when it is loaded, and the name to answer under.

        Raises:
            ApiError: 404 unknown; 503 where loading takes longer than the request may, or has failed; 507 where there
                is no room, with the bytes.
        """
        if (reason := base.llm.unavailable()) is not None:
            raise Unavailable(reason, retry_after=10)
        model = self.find(name)
        self._check_wait(model, _timeout(request, base.settings.request_timeout))
        try:
            llm = await asyncio.shield(asyncio.wrap_future(self.pool.ready(model.name)))
        except Exception as error:
            raise as_load_error(model, error) from None
        return self._context(base, model, llm).answering_as(name or model.name), name or model.name

    def _context(self, base: Context, model: PooledModel, llm: Any) -> Context:
        known = self._contexts.get(model.name)
        if known is None or known.llm is not llm:
            names = (model.name, *model.entry.aliases)
            known = dataclasses.replace(
                base,
                llm=llm,
                settings=dataclasses.replace(base.settings, served_model_names=names),
                metrics=self.families.of(llm, model.name),
            )
            self._contexts[model.name] = known
        return known

    def _check_wait(self, model: PooledModel, timeout: float) -> None:
        left = load_seconds_left(self.pool, model)
        if left > timeout:
            raise ApiError(
                503,
                f"the model {model.name!r} is loading ({model.stage or 'waiting'}); about {left:.0f} s are left, "
                f"more than the {timeout:g} s of this request; ask again then",
                code="loading",
                headers={"retry-after": str(math.ceil(left))},
            )

    def waiting_for(self, name: str | None) -> str:
        """What a request of this model waits for, in words."""
        model = self.find(name)
        if model.state is State.LOADING:
            return f"loading {model.name}: {model.stage}"
        current = self.pool.residents.current
        if current is not None and current is not model:
            return f"{model.name} waits for its turn; {current.name} is running"
        return f"{model.name} is running"


@final
class PoolMetrics:
    """The metrics of all models together, for the page."""

    def __init__(self, models: PoolModels):
        self._models = models

    @property
    def families(self) -> Families:
        """Of all models."""
        return self._models.families

    def snapshot(self) -> dict[str, Any]:
        """What the page draws: sums over the models that are ready, and the pool's own state."""
        each = [ctx.metrics.snapshot() for ctx in self._models.contexts]
        summed = {name: sum(one.get(name) or 0 for one in each) for name in _SUMMED}
        spread = {name: max((one[name] for one in each if one.get(name) is not None), default=None) for name in _WORST}
        return summed | spread | {"time": time.time(), "pool": pool_state(self._models.pool)}


def load_seconds_left(pool: Pool, model: PooledModel) -> float:
    """About how long until a model is loaded, with those that are loaded before it; 0 where it is."""
    if model.state not in (State.LOADING, State.ABSENT):
        return 0.0
    known = [other.measured.load for other in pool.models if other.measured.load]
    usual = sum(known) / len(known) if known else _GUESSED_LOAD_SECONDS
    if model.state is State.ABSENT:
        ahead = sum(other.state is State.LOADING for other in pool.models)
        return (ahead + 1) * (model.measured.load or usual)
    ahead = sum(other.state is State.LOADING and other.loading_since < model.loading_since for other in pool.models)
    return max(0.0, (ahead + 1) * usual - (0.0 if ahead else time.monotonic() - model.loading_since))


def as_load_error(model: PooledModel, error: BaseException) -> ApiError:
    """Why a model is not there, for a client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NoRoom):
        return ApiError(507, str(error), param="model", code="no_room")
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": str(error.retry_after)})
    what = str(error) if isinstance(error, ValueError) else type(error).__name__
    return ApiError(
        503,
        f"the model {model.name!r} could not be loaded: {what}",
        code="model_failed",
        headers={"retry-after": "5"},
    )


def _timeout(request: Request, longest: float) -> float:
    """Seconds that a client waits, where it says so, up to the server's own limit."""
    for name in _TIMEOUT_HEADERS:
        try:
            value = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if value > 0:
            return min(value, longest)
    return longest
