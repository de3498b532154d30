"""What every route needs: the engine, its names, the settings and the metrics."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fastapi import Request

from jaxllm.parsing.registry import AnswerFormat
from jaxllm.server.errors import ApiError
from jaxllm.server.file_store import Batch, FileStore
from jaxllm.server.response_store import ResponseStore
from jaxllm.version import __version__

if TYPE_CHECKING:
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.pool.model import PooledModel
    from jaxllm.pool.pool import Pool
    from jaxllm.pool.solo import Sleeper
    from jaxllm.server.prometheus import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossOrigin:
    """Which web pages of other origins may call the server, and how: the flags' names and meaning are vLLM's."""

    origins: tuple[str, ...] = ("*",)
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the server behaves towards clients. Seconds and bytes."""

    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    request_timeout: float = 1800.0
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    pooling: str = "mean"
    metrics_namespace: str = "jaxllm"
    cross_origin: CrossOrigin = field(default_factory=CrossOrigin)


class Models(Protocol):
    """The models of a pool; see `PoolModels`."""

    pool: Pool

    def find(self, name: str | None) -> PooledModel: ...
    def is_ready(self, name: str | None) -> bool: ...
    def waiting_for(self, name: str | None) -> str: ...
    async def choose(self, base: Context, name: str | None, request: Request) -> tuple[Context, str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One per app; of a pool also one for each of its `models`, with its frontend in place of the pool's face.

    A request to an adapter has one with its name, which shares all the rest.
    """

    llm: AsyncLLM
    settings: Settings
    metrics: Metrics
    models: Models | None = None
    sleeper: Sleeper
    responses: ResponseStore = field(default_factory=ResponseStore)
    files: FileStore = field(default_factory=FileStore)
    batches: dict[str, Batch] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time.time()))
    adapter: str | None = None

    @property
    def answer_format(self) -> AnswerFormat:
        """How the model's answers are read: by the flags, or by its chat template."""
        template, settings = self.llm.get_tokenizer().chat.source(with_tools=True), self.settings
        return AnswerFormat.chosen(template, settings.tool_call_parser, settings.reasoning_parser)

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes where answers may, with the version and the engine's configuration."""
        return f"fp_{hashlib.sha256(f'{__version__} {self.llm.config}'.encode()).hexdigest()[:10]}"

    def check_model(self, name: str | None) -> str:
        """The name to answer under; no name is the first. Raises 404 for a model that is not served."""
        names = self.settings.served_model_names
        if name and name not in (*names, *(entry.name for entry in self.llm.adapters.served)):
            raise ApiError(
                404,
                f"the model {name[:100]!r} is not served here; use {names[0]!r}",
                param="model",
                code="model_not_found",
            )
        return name or names[0]

    def answering_as(self, name: str) -> Context:
        """The context of a request to this name, which is served."""
        if name in self.settings.served_model_names:
            return self
        return dataclasses.replace(self, adapter=name)


def context_of(request: Request) -> Context:
    """The context of the app that serves `request`."""
    return request.app.state.context


async def model_context(request: Request, name: str | None) -> tuple[Context, str]:
    """The context of the model that a request names, and the name to answer under; waits while it is loaded.

    Raises ApiError for a model that is not served, or cannot be.
    """
    ctx = context_of(request)
    if ctx.models is None:
        model = ctx.check_model(name)
        return ctx.answering_as(model), model
    return await ctx.models.choose(ctx, name, request)


def request_id_of(request: Request) -> str:
    """The id under which this request is logged."""
    return request.state.request_id
