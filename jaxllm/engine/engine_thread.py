"""The engine's own thread: commands in, updates out, and what happens when an iteration fails.

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

from jaxllm.engine.completions import Job, Jobs
from jaxllm.engine.engine import Engine
from jaxllm.engine.outputs import CompletionBuilder, Logprob
from jaxllm.engine.scoring import Scorer, ScoringPass
from jaxllm.telemetry.accounting import percent
from jaxllm.telemetry.device_peaks import measured_ceilings

log = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5  # how often an idle thread shows that it lives
_REPORT_SECONDS = 10.0


class EngineError(RuntimeError):
    """The engine failed while it worked on this request; the cause is in the log."""


class _WorkArrived(Exception):
    """Ends a measurement that may wait."""


@dataclass(slots=True)
class CompletionDelta:
    """What is new of one completion; `finish_reason` is set on its last one."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Update:
    """News for one listener: a delta of its job, its finished pass, or the error that ended it."""

    listener: Any
    delta: CompletionDelta | None = None
    finished: bool = False
    error: Exception | None = None


@dataclass(slots=True)
class _Task:
    """A job or a scoring pass with whoever waits for it, and how much of each completion was passed on."""

    listener: Any
    job: Job | None = None
    scores: ScoringPass | None = None
    request_id: str | None = None
    sent: dict[int, tuple[int, int]] | None = None


class EngineThread:
    """Steps one engine as long as there is work.

    Args:
        publish: called on the engine's thread with the updates of one iteration.
        before_step: called before every step; a hook for tests that inject faults.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Jobs,
        publish: Callable[[list[Update]], None],
        before_step: Callable[[], None] | None = None,
    ):
        self.death: BaseException | None = None
        self.last_progress = self._last_report = time.monotonic()
        self.num_failures = 0
        self._engine, self._jobs, self._publish, self._before_step = engine, jobs, publish, before_step
        self._scorer = Scorer(engine)
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._tasks: dict[Any, _Task] = {}  # by listener
        self._by_job: dict[Job, _Task] = {}
        self._failed_at = -1
        self._wants_ceilings = False
        self._updates: list[Update] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # Called from any thread.

    def submit(self, job: Job, listener: Any, request_id: str | None = None) -> None:
        """Start a prepared job; `listener` identifies it in updates."""
        self._commands.put(lambda: self._start(_Task(listener, job=job, request_id=request_id, sent={})))

    def score(self, scores: ScoringPass, listener: Any) -> None:
        """Start a scoring pass; one update says when it is done."""
        self._commands.put(lambda: self._start(_Task(listener, scores=scores)))

    def cancel(self, listener: Any) -> None:
        """End what was started for a listener; there will be no more updates."""
        self._commands.put(lambda: self._cancel(listener))

    def measure_when_idle(self) -> None:
        """Learn what the devices could do, for MFU and MBU, where no data sheet says it.

        At the first pause of half a second after this call; work that arrives meanwhile goes first, and the next such
        pause is tried. Call it when nothing compiles any more.
        """
        self._commands.put(self._want_ceilings)

    def stop(self, timeout: float = 10.0) -> None:
        """End the thread; unfinished work is aborted."""
        self._commands.put(None)
        self._thread.join(timeout)

    @property
    def num_queued(self) -> int:
        """Requests that are accepted and do not run yet."""
        return self._engine.scheduler.num_waiting + self._commands.qsize() + len(self._scorer)

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still do anything."""
        return self.death is None and self._thread.is_alive()

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work and no progress."""
        busy = not self._commands.empty() or self._engine.has_work or self._scorer.has_work
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
                self._fail(task, EngineError("the engine failed and stops"))
            self._flush()

    def _obey(self) -> bool:
        """Carry out commands, waiting for one when there is nothing else to do. False: stop."""
        busy = self._engine.has_work or self._scorer.has_work
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
            if self._before_step is not None and (self._engine.has_work or self._scorer.has_work):
                self._before_step()
            for news in self._engine.step():
                delivered = self._jobs.deliver(news)
                if delivered is not None:
                    self._pass_on(*delivered)
            self._collect_scores()
        except Exception as error:
            self._recover(error)
        self._flush()
        if self._engine.progress != before:
            self.last_progress = time.monotonic()
            self._report()
        elif self._engine.has_work or self._scorer.has_work:
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
        try:
            scores = task.scores or (self._jobs.scoring_pass(task.job) if task.job else None)
            if scores is not None:
                self._scorer.check(scores.token_ids)
                task.scores = scores
                self._scorer.add(scores)
            else:
                self._start_job(task)
            self._tasks[task.listener] = task
        except ValueError as error:
            self._updates.append(Update(task.listener, finished=True, error=error))

    def _start_job(self, task: _Task) -> None:
        assert task.job is not None
        self._jobs.start(task.job, task.request_id)
        self._by_job[task.job] = task

    def _cancel(self, listener: Any) -> None:
        if (task := self._tasks.get(listener)) is not None:
            self._forget(task)

    def _forget(self, task: _Task) -> None:
        self._tasks.pop(task.listener, None)
        if task.scores is not None:
            task.scores.cancelled = True
        if task.job is not None:
            self._by_job.pop(task.job, None)
            self._jobs.abort(task.job)

    def _fail(self, task: _Task, error: Exception) -> None:
        self._forget(task)
        self._updates.append(Update(task.listener, finished=True, error=error))

    def _pass_on(self, job: Job, builder: CompletionBuilder) -> None:
        task = self._by_job[job]
        assert task.sent is not None
        out, text = builder.output, builder.stable_text
        num_chars, num_tokens = task.sent.get(out.index, (0, 0))
        logprobs = out.logprobs[num_tokens:] if out.logprobs is not None else None
        delta = CompletionDelta(
            out.index, text[num_chars:], out.token_ids[num_tokens:], logprobs, out.finish_reason, out.stop_reason
        )
        task.sent[out.index] = (len(text), len(out.token_ids))
        finished = job.output.finished
        error = ValueError(job.output.error) if job.output.error else None
        self._updates.append(Update(task.listener, delta, finished, error))
        if finished:
            self._forget(task)

    def _collect_scores(self) -> None:
        if (scores := self._scorer.step()) is None:
            return
        task = next((t for t in self._tasks.values() if t.scores is scores), None)
        if task is None:
            return
        if task.job is None:
            del self._tasks[task.listener]
            self._updates.append(Update(task.listener, finished=True))
            return
        try:
            self._jobs.attach_scores(task.job, scores)
            self._start_job(task)
        except ValueError as error:
            self._fail(task, error)

    def _recover(self, error: Exception) -> None:
        """Carry on after a failed step, or raise when that has not helped before."""
        log.error("an iteration failed", exc_info=error)
        self.num_failures += 1
        if self._failed_at == self._engine.num_completed:
            raise EngineError("two iterations failed in a row") from error
        self._failed_at = self._engine.num_completed
        lost = {self._jobs.owner(request) for request in self._engine.unfinished if request.on_device}
        passes = self._scorer.reset()
        failure = EngineError("the engine failed while it worked on this request; it may be sent again")
        for task in list(self._tasks.values()):
            if (task.job is not None and task.job in lost) or task.scores in passes:
                self._fail(task, failure)
        self._engine.recover()
