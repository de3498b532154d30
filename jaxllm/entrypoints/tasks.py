"""Work under way on one engine, who hears of it, and what happens when an iteration fails.

Policy for errors (docs/serving.md): a step that raises ends every request that had state on the device, with an
error; pages, slots and prefix cache start anew and waiting requests go on. A second failure before any iteration
has succeeded is final. Everything here happens on the thread that steps the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import EngineError
from jaxllm.engine.outputs import CompletionDelta
from jaxllm.engine.work import Work

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Update:
    """News for one listener: a delta of its work, its end, or the error that ended it."""

    listener: Any
    delta: CompletionDelta | None = None
    finished: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Work, and whoever waits for it."""

    work: Work
    listener: Any


class Tasks:
    """The tasks of one engine.

    Args:
        jobs: the engine, with its text side.
        publish: called with the updates of one iteration.
        before_step: called before every step; a hook for tests that inject faults.
    """

    def __init__(
        self,
        jobs: Jobs,
        publish: Callable[[list[Update]], None],
        before_step: Callable[[], None] | None = None,
    ):
        self.num_failures = 0
        self._engine, self._jobs, self._publish, self._before_step = jobs.engine, jobs, publish, before_step
        self._tasks: dict[Any, Task] = {}  # by listener
        self._failed_at = -1
        self._updates: list[Update] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._jobs.has_work

    def __contains__(self, listener: Any) -> bool:
        return listener in self._tasks

    def start(self, task: Task) -> None:
        """Begin work; where that is refused its listener hears why."""
        self._tasks[task.listener] = task
        task.work.notify = self._heard(task)
        try:
            task.work.start()
        except ValueError as error:
            self._fail(task, error)
        except Exception as error:  # a fault of ours, which costs nobody else more than it has to
            self._fail(task, EngineError(f"the request could not be started: {type(error).__name__}"))
            self._recover(error)

    def cancel(self, listener: Any) -> None:
        """End what was started for a listener; it hears nothing more."""
        if (task := self._tasks.pop(listener, None)) is not None:
            self._end(task)

    def step(self) -> bool:
        """One iteration, and its updates out; whether anything has moved. Raises EngineError where that is final."""
        before = self._engine.progress
        if self._before_step is not None and self._jobs.has_work:
            self._try(self._before_step, self._jobs.step)
        else:
            self._try(self._jobs.step)
        self.flush()
        return self._engine.progress != before

    def settle(self) -> None:
        """Read everything that is on its way; see `Engine.settle`. Raises EngineError where a failure is final."""
        self._try(self._engine.settle)
        self.flush()

    def _try(self, *actions: Callable[[], None]) -> None:
        try:
            for action in actions:
                action()
        except Exception as error:
            self._recover(error)

    def flush(self) -> None:
        """Send the updates that have gathered."""
        if self._updates:
            updates, self._updates = self._updates, []
            self._publish(updates)

    def refuse(self, task: Task, error: Exception) -> None:
        """Tell a listener that its work will not begin."""
        self._publish([Update(task.listener, finished=True, error=error)])

    def fail_all(self, error: Exception) -> None:
        """Tell every listener that its work has ended, without touching the engine, which may be broken."""
        for task in list(self._tasks.values()):
            self._updates.append(Update(task.listener, finished=True, error=error))
        self._tasks.clear()
        self.flush()

    def _heard(self, task: Task) -> Callable[[Work, CompletionDelta | None], None]:
        def hear(work: Work, delta: CompletionDelta | None) -> None:
            finished = delta is None
            self._updates.append(Update(task.listener, delta, finished, work.error if finished else None))
            if finished:
                self._tasks.pop(task.listener, None)

        return hear

    def _fail(self, task: Task, error: Exception) -> None:
        self._tasks.pop(task.listener, None)
        self._end(task)
        self._updates.append(Update(task.listener, finished=True, error=error))

    def _end(self, task: Task) -> None:
        task.work.notify = None
        try:
            task.work.abort()
        except Exception as error:
            self._recover(error)
            task.work.abort()

    def _recover(self, error: Exception) -> None:
        """Carry on after a failed step, or raise when that has not helped before."""
        log.error("an iteration failed", exc_info=error)
        self.num_failures += 1
        if self._failed_at == self._engine.num_completed:
            raise EngineError("two iterations failed in a row") from error
        self._failed_at = self._engine.num_completed
        lost = [task for task in self._tasks.values() if task.work.on_device]
        self._jobs.recover()
        failure = EngineError("the engine failed while it worked on this request; it may be sent again")
        for task in lost:
            self._fail(task, failure)
