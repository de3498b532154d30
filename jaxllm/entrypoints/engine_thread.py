"""The engine's own thread: work in, updates out.

Where an iteration fails, see `Tasks`. A failure that is final, or the thread's own end: every request ends with an
error and `death` is set for the owner to exit on. Knows nothing of event loops or protocols.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import EngineError
from jaxllm.engine.work import Work
from jaxllm.entrypoints.tasks import Task, Tasks, Update
from jaxllm.telemetry.accounting import percent
from jaxllm.telemetry.device_peaks import measured_ceilings

log = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_SECONDS = 0.5  # how often an idle thread shows that it lives
_REPORT_SECONDS = 10.0
_STOPPED = "the engine failed and stops"


class _WorkArrived(Exception):
    """Ends a measurement that may wait."""


@dataclass(frozen=True, slots=True)
class _Call:
    """Something to do between two iterations, whose result somebody waits for."""

    run: Callable[[], None]
    future: Future[Any]

    def __call__(self) -> None:
        self.run()


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
        self._engine, self._jobs = jobs.engine, jobs
        self._tasks = Tasks(jobs, publish, before_step)
        self._commands: queue.SimpleQueue[Task | _Call | Callable[[], None] | None] = queue.SimpleQueue()
        self._wants_ceilings = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, work: Work, listener: Any) -> None:
        """Start work that is prepared; `listener` identifies it in updates."""
        self._commands.put(Task(work, listener))
        if self.death is not None:
            self._refuse_all()

    def cancel(self, listener: Any) -> None:
        """End what was started for a listener; there will be no more updates."""
        self._commands.put(lambda: self._tasks.cancel(listener))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call something between two iterations, when nothing is on its way; the future has what it returns or raises.

        What it raises harms nobody else.
        """
        future: Future[T] = Future()
        self._commands.put(_Call(lambda: self._answer(function, future), future))
        if self.death is not None:
            self._refuse_all()
        return future

    def measure_when_idle(self) -> None:
        """Learn what the devices could do, for MFU and MBU, where no data sheet says it.

        At the first pause of half a second after this call; work that arrives meanwhile goes first, and the next such
        pause is tried. Call it when nothing compiles any more.
        """
        self._commands.put(self._want_ceilings)

    def fail(self, error: Exception) -> None:
        """End the thread as a failure that is final ends it."""

        def end() -> None:
            raise error

        self._commands.put(end)

    def stop(self, timeout: float = 10.0) -> bool:
        """End the thread; unfinished work is aborted. False where it is stuck."""
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def num_failures(self) -> int:
        """Iterations that raised."""
        return self._tasks.num_failures

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
            self._tasks.fail_all(EngineError(_STOPPED))
            self._refuse_all()

    def _refuse_all(self) -> None:
        """The thread has ended: nobody who comes after that shall wait. Called there, and by whoever comes."""
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if isinstance(command, Task):
                self._tasks.refuse(command, EngineError(_STOPPED))
            elif isinstance(command, _Call):
                command.future.set_exception(EngineError(_STOPPED))

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
            if isinstance(command, Task):
                self._tasks.start(command)
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

    def _answer(self, function: Callable[[], T], future: Future[T]) -> None:
        self._tasks.settle()
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def _step(self) -> None:
        if self._tasks.step():
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
            len(engine.scheduler.running),
            engine.scheduler.num_waiting,
            recent["prefill_tokens_per_s"],
            recent["generation_tokens_per_s"],
            percent(recent["mfu"]),
            percent(recent["mbu"]),
            100 * (1 - engine.pool.num_free / engine.pool.num_usable),
        )
        if (drafts := engine.drafts).num_drafts:
            rate, length = drafts.acceptance_rate, drafts.mean_acceptance_length
            log.info(
                "%s of %d drafted tokens right, %.2f tokens per iteration with drafts",
                percent(rate),
                drafts.num_draft_tokens,
                length,
            )
