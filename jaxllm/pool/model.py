"""One model of a pool: what it is, how far it is, and what was measured of it."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.config import EngineConfig
from jaxllm.pool.config import ModelEntry

if TYPE_CHECKING:
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.entrypoints.tasks import Task, Tasks, Update
    from jaxllm.pool.residence import Residence

_LEARN = 0.2  # weight of a new sample
_GUESSED_BYTES_PER_S = 2e9


class Way(Protocol):
    """How a frontend's listeners are reached; see `Lane`."""

    def publish(self, updates: list[Update]) -> None: ...
    def refuse(self, task: Task, error: Exception) -> None: ...


class State(StrEnum):
    """How far a model is; `ready` ones may be on the device or in host memory."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(slots=True)
class Measured:
    """Seconds, learnt while serving; 0 while unknown."""

    step: float = 0.0
    switch: float = 0.0
    load: float = 0.0

    def learn(self, what: str, seconds: float) -> None:
        """Take one more sample of `step`, `switch` or `load`."""
        old = getattr(self, what)
        setattr(self, what, old + _LEARN * (seconds - old) if old else seconds)


@dataclass(slots=True, eq=False)
class PooledModel:
    """A model and what belongs to it; changed by the driver's thread alone, read by all.

    Attributes:
        keep_alive: seconds on the device without requests.
        stage: what is being done while it loads. error: why it failed.
        loaded: the future of its frontend; None before anybody asked for it.
        lane: how its frontend reaches the driver.
        open: tasks that the policy has, by listener. prefilling: those without a first token.
        fetching: its weights on their way to the devices. moving: its cache on its way (see `CacheMoves`).
        used: when it had work last, on the monotonic clock.
        removed: set when it is undeployed and nothing of it is left.
        num_switches: times it came onto the devices.
    """

    entry: ModelEntry
    config: EngineConfig
    keep_alive: float = math.inf
    state: State = State.ABSENT
    stage: str = ""
    error: Exception | None = None
    failed_at: float = 0.0
    loaded: Future[AsyncLLM] | None = None
    loading_since: float = 0.0
    llm: AsyncLLM | None = None
    lane: Way | None = None
    tasks: Tasks | None = None
    residence: Residence | None = None
    open: dict[Any, Task] = field(default_factory=dict)
    prefilling: set[Task] = field(default_factory=set)
    fetching: Future[Any] | None = None
    moving: Future[tuple[int, float]] | None = None
    used: float = field(default_factory=time.monotonic)
    removed: Future[None] | None = None
    num_switches: int = 0
    measured: Measured = field(default_factory=Measured)

    @property
    def name(self) -> str:
        """That requests choose it by."""
        return self.entry.name

    @property
    def has_work(self) -> bool:
        """Whether any request of it is unfinished."""
        return bool(self.open)

    @property
    def place(self) -> str:
        """Where its weights are: `device`, `host` or `disk`."""
        if self.residence is None:
            return "disk"
        return "device" if self.residence.has_weights else "host" if self.residence.is_at_rest else "disk"

    @property
    def switch_seconds(self) -> float:
        """Measured, or guessed from its bytes."""
        if self.measured.switch or self.residence is None:
            return self.measured.switch
        return self.residence.sizes.weights / _GUESSED_BYTES_PER_S


class MeasuredCosts:
    """The `Costs` of a pool's models, as they were measured."""

    def __init__(self, models: dict[str, PooledModel]):
        self._models = models

    def prefill_seconds(self, model: str, item: Any) -> float:
        """See `Costs`."""
        llm, output = self._models[model].llm, getattr(item.work, "output", None)
        tokens = len(output.prompt_token_ids) if output is not None else 1
        rate = llm.engine.accounting.prefill_rate() if llm is not None else 0.0
        return tokens / (rate or 1000.0)

    def step_seconds(self, model: str, num_requests: int) -> float:
        """See `Costs`."""
        return self._models[model].measured.step or 0.02

    def switch_seconds(self, model: str) -> float:
        """See `Costs`."""
        return self._models[model].switch_seconds

    def max_batch(self, model: str) -> int:
        """See `Costs`."""
        llm = self._models[model].llm
        return llm.engine.runner.shapes.spare_slot if llm is not None else 1
