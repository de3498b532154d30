"""One model's way to the driver: what its frontend takes for the engine's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, final

from jaxllm.engine.work import Work
from jaxllm.entrypoints.tasks import Task, Update

if TYPE_CHECKING:
    from jaxllm.pool.model import PooledModel

T = TypeVar("T")


class Shared(Protocol):
    """The thread of all models; see `Driver`."""

    def submit(self, model: PooledModel, lane: Lane, task: Task) -> None: ...
    def cancel(self, model: PooledModel, listener: Any) -> None: ...
    def call(self, function: Callable[[], T]) -> Future[T]: ...
    def with_model(self, model: PooledModel, function: Callable[[], T]) -> T: ...
    def heard(self, model: PooledModel, updates: list[Update]) -> None: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def stalled_seconds(self) -> float: ...


@final
class Waiter:
    """A listener for callers that wait on their own thread.

    Attributes:
        finished: set when the work has ended. error: why, if not well.
    """

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.error: Exception | None = None

    def take(self, update: Update) -> None:
        """News; only the end counts."""
        if update.finished:
            self.error = update.error
            self.finished.set()


@final
class Lane:
    """A `Stepper` (see `AsyncLLM`) that shares its thread with the other models of a pool."""

    def __init__(self, driver: Shared, model: PooledModel, publish: Callable[[list[Update]], None]):
        self._driver, self._model, self._publish = driver, model, publish

    def publish(self, updates: list[Update]) -> None:
        """Hand updates to their listeners: those of the frontend, and waiters."""
        for update in updates:
            if isinstance(update.listener, Waiter):
                update.listener.take(update)
        if others := [update for update in updates if not isinstance(update.listener, Waiter)]:
            self._publish(others)

    def heard(self, updates: list[Update]) -> None:
        """Updates of the engine: the driver's first."""
        self._driver.heard(self._model, updates)
        self.publish(updates)

    def refuse(self, task: Task, error: Exception) -> None:
        """Tell a listener whose task does not begin."""
        self.publish([Update(task.listener, finished=True, error=error)])

    def submit(self, work: Work, listener: Any) -> None:
        """Queue work; it begins when the model has its turn."""
        self._driver.submit(self._model, self, Task(work, listener))

    def cancel(self, listener: Any) -> None:
        """End what was started for a listener."""
        self._driver.cancel(self._model, listener)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call something on the driver's thread, between two turns, with the model on the devices."""
        return self._driver.call(lambda: self._driver.with_model(self._model, function))

    def measure_when_idle(self) -> None:
        """A pool does not: its devices are never one model's."""

    def stop(self, timeout: float = 10.0) -> bool:
        """The driver goes on without this model."""
        return True

    @property
    def num_failures(self) -> int:
        """Iterations that raised."""
        return self._model.tasks.num_failures if self._model.tasks is not None else 0

    @property
    def num_queued(self) -> int:
        """Requests that are accepted and do not run yet."""
        model = self._model
        engine_waits = model.llm.engine.scheduler.num_waiting if model.llm is not None else 0
        started = sum(listener in model.tasks for listener in list(model.open)) if model.tasks is not None else 0
        return max(0, len(model.open) - started) + engine_waits

    @property
    def is_alive(self) -> bool:
        """Whether the driver can still do anything."""
        return self._driver.is_alive

    @property
    def stalled_seconds(self) -> float:
        """How long the driver has made no progress while this model had work."""
        return self._driver.stalled_seconds if self._model.has_work else 0.0
