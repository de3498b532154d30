"""The engine's own thread: work in, updates out, and what happens when an iteration fails.

Policy for errors (docs/serving.md): a step that raises ends every request that had state on the device, with an
error; pages, slots and prefix cache start anew and waiting requests go on. A second failure before any iteration
has succeeded, a failed recovery, or the thread's own end is final: every request ends with an error and `death` is
set for the owner to exit on. Knows nothing of event loops or protocols.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import EngineError
from jaxllm.engine.outputs import CompletionDelta
from jaxllm.engine.work import Work
from jaxllm.telemetry.accounting import percent
from jaxllm.telemetry.device_peaks import measured_ceilings

log = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5  # how often an idle thread shows that it lives
_REPORT_SECONDS = 10.0
_STOPPED = "the engine failed and stops"


class _WorkArrived(Exception):
    """Ends a measurement that may wait."""


@dataclass(slots=True)
class Update:
    """News for one listener: a delta of its work, its end, or the error that ended it."""

    listener: Any
    delta: CompletionDelta | None = None
    finished: bool = False
    error: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """Work, and whoever waits for it."""

    work: Work
    listener: Any


class EngineThread:
    """Steps one engine as long as there is work.

    Args:
        publish: called on the engine's thread with the updates of one iteration.
        before_step: called before every step; a hook for tests that inject faults.
    """

    def __init__(
        self,
        jobs: Jobs,
        publish: Callable[[list[Update]], None],
        before_step: Callable[[], None] | None = None,
    ):
        self.death: BaseException | None = None
        self.last_progress = self._last_report = time.monotonic()
        self.num_failures = 0
        self._engine, self._jobs, self._publish, self._before_step = jobs.engine, jobs, publish, before_step
        self._commands: queue.SimpleQueue[_Task | Callable[[], None] | None] = queue.SimpleQueue()
        self._tasks: dict[Any, _Task] = {}  # by listener
        self._failed_at = -1
        self._wants_ceilings = False
        self._updates: list[Update] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, work: Work, listener: Any) -> None:
        """Start work that is prepared; `listener` identifies it in updates."""
        self._commands.put(_Task(work, listener))
        if self.death is not None:
            self._refuse_all()

    def cancel(self, listener: Any) -> None:
        """End what was started for a listener; there will be no more updates."""
        self._commands.put(lambda: self._cancel(listener))

    def measure_when_idle(self) -> None:
        """Learn what the devices could do, for MFU and MBU, where no data sheet says it.

        At the first pause of half a second after this call; work that arrives meanwhile goes first, and the next such
        pause is tried. Call it when nothing compiles any more.
        """
        self._commands.put(self._want_ceilings)

    def stop(self, timeout: float = 10.0) -> bool:
        """End the thread; unfinished work is aborted. False where it is stuck."""
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def num_queued(self) -> int:
        """Requests that are accepted and do not run yet."""
        return self._engine.scheduler.num_waiting + self._commands.qsize() + len(self._jobs.scorer)

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still do anything."""
        return self.death is None and self._thread.is_alive()

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work and no progress."""
        busy = not self._commands.empty() or self._jobs.has_work
        return time.monotonic() - self.last_progress if busy else 0.0

    # The thread.

    def _run(self) -> None:
        try:
            while self._obey():
                self._step()
        except BaseException as error:
            log.critical("the engine is dead", exc_info=error)
            self.death = error
        else:
            self.death = EngineError("the engine was shut down")
        finally:
            self.death = self.death or EngineError("the engine's thread ended")
            for task in list(self._tasks.values()):
                self._updates.append(Update(task.listener, finished=True, error=EngineError(_STOPPED)))
            self._flush()
            self._refuse_all()

    def _refuse_all(self) -> None:
        """The thread has ended: nobody who comes after that shall wait. Called there, and by whoever comes."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, _Task):
                self._publish([Update(command.listener, finished=True, error=EngineError(_STOPPED))])

    def _obey(self) -> bool:
        """Carry out commands, waiting for one when there is nothing else to do. False: stop."""
        busy = self._jobs.has_work
        while True:
            try:
                command = self._commands.get_nowait() if busy else self._commands.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                if not busy:
                    self._measure()
                    self.last_progress = time.monotonic()
                return True
            if command is None:
                return False
            if not busy:
                self.last_progress = time.monotonic()
                busy = True
            if isinstance(command, _Task):
                self._start(command)
            else:
                command()

    def _want_ceilings(self) -> None:
        self._wants_ceilings = self._engine.accounting.ceilings is None

    def _measure(self) -> None:
        if not self._wants_ceilings:
            return
        try:
            ceilings = measured_ceilings(self._engine.runner.model, self._give_way)
        except _WorkArrived:
            return
        except Exception as error:  # no memory to measure with, say
            log.warning("MFU and MBU stay unknown: the device cannot be measured", exc_info=error)
        else:
            self._engine.accounting.ceilings = ceilings
            log.info(
                "%s: %.3g TFLOP/s, %.3g GB/s", ceilings.source, ceilings.flops_per_s / 1e12, ceilings.bytes_per_s / 1e9
            )
        self._wants_ceilings = False

    def _give_way(self) -> None:
        if not self._commands.empty():
            raise _WorkArrived

    def _step(self) -> None:
        before = self._engine.progress
        try:
            if self._before_step is not None and self._jobs.has_work:
                self._before_step()
            self._jobs.step()
        except Exception as error:
            self._recover(error)
        self._flush()
        if self._engine.progress != before:
            self.last_progress = time.monotonic()
            self._report()
        elif self._jobs.has_work:
            time.sleep(0.001)  # nothing can run until something else ends

    def _report(self) -> None:
        """One line about the last iterations, every `_REPORT_SECONDS` while there is work."""
        if self.last_progress - self._last_report < _REPORT_SECONDS:
            return
        self._last_report = self.last_progress
        engine, recent = self._engine, self._engine.accounting.recent()
        log.info(
            "running %d, waiting %d; prefill %.0f and output %.0f tokens/s of device time; MFU %s, MBU %s; "
            "cache %.0f%% full",
            len(engine.scheduler.running), engine.scheduler.num_waiting, recent["prefill_tokens_per_s"],
            recent["generation_tokens_per_s"], percent(recent["mfu"]), percent(recent["mbu"]),
            100 * (1 - engine.pool.num_free / engine.pool.num_usable),
        )  # fmt: skip

    def _flush(self) -> None:
        if self._updates:
            updates, self._updates = self._updates, []
            self._publish(updates)

    def _start(self, task: _Task) -> None:
        self._tasks[task.listener] = task
        task.work.notify = self._heard(task)
        try:
            task.work.start()
        except ValueError as error:
            self._fail(task, error)
        except Exception as error:  # a fault of ours, which costs nobody else more than it has to
            self._fail(task, EngineError(f"the request could not be started: {type(error).__name__}"))
            self._recover(error)

    def _heard(self, task: _Task) -> Callable[[Work, CompletionDelta | None], None]:
        def hear(work: Work, delta: CompletionDelta | None) -> None:
            finished = delta is None
            self._updates.append(Update(task.listener, delta, finished, work.error if finished else None))
            if finished:
                self._tasks.pop(task.listener, None)

        return hear

    def _cancel(self, listener: Any) -> None:
        if (task := self._tasks.pop(listener, None)) is not None:
            self._end(task)

    def _fail(self, task: _Task, error: Exception) -> None:
        self._tasks.pop(task.listener, None)
        self._end(task)
        self._updates.append(Update(task.listener, finished=True, error=error))

    def _end(self, task: _Task) -> None:
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
