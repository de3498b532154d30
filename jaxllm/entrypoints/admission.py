"""Admission by SLO: a request is refused early that would miss it, or make others miss it.

Before a request is queued its time to first token is predicted from what is measured: operations that wait before it
and its own (prefix hits taken off), over the operations per second of recent prefills, plus the wait for a slot. So is
the time per token, from recent decodes. Off unless asked for; the error of the prediction is exported.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.engine.completions import Job
from jaxllm.engine.engine import Engine
from jaxllm.engine.errors import Unavailable
from jaxllm.scheduling.request import Request
from jaxllm.telemetry.accounting import IterationRecord
from jaxllm.telemetry.figures import Figure

_WINDOW = 256  # predictions behind the error
_MOST_RETRY_S = 60


@dataclass(slots=True)
class _Open:
    """A job that was admitted, and what was predicted of it."""

    job: Job
    predicted: float | None


class Admission:
    """Decides for one engine; called where jobs are submitted, which need not be the thread that steps.

    Args:
        engine: whose queues and records are read.
        slo: limits in seconds, `ttft` and `tpot`.
        clock: for tests.
    """

    def __init__(self, engine: Engine, slo: Mapping[str, float], clock: Callable[[], float] = time.perf_counter):
        if unknown := sorted(set(slo) - {"ttft", "tpot"}):
            raise ValueError(f"slo: {unknown[0]} cannot be predicted when a request comes; use ttft and tpot")
        self.num_refused = 0
        self._engine, self._slo, self._clock = engine, slo, clock
        self._open: list[_Open] = []
        self._errors: deque[float] = deque(maxlen=_WINDOW)

    def check(self, jobs: Sequence[Job]) -> None:
        """Note these jobs, which are about to be submitted. Raises Unavailable where they would miss the SLO."""
        self._settle()
        ttft, tpot = self.predicted_ttft(jobs), self.predicted_tpot(len(jobs))
        for name, value in (("ttft", ttft), ("tpot", tpot)):
            limit = self._slo.get(name)
            if value is not None and limit is not None and value > limit:
                self.num_refused += 1
                wait = min(_MOST_RETRY_S, max(1, math.ceil(value - limit)))
                raise Unavailable(
                    f"the {name} would be about {value:.3g} s and the SLO is {limit:g} s; try again later or elsewhere",
                    retry_after=wait,
                )
        self._open += [_Open(job, ttft) for job in jobs]

    def predicted_ttft(self, jobs: Sequence[Job]) -> float | None:
        """Seconds to the first token of the last of these jobs, or None while no prefill was measured."""
        engine = self._engine.scoring_engine  # of two pools the one that computes prompts
        records = [r for r in _recent(engine) if 2 * r.num_prefill_tokens > r.num_tokens]
        seconds = sum(r.seconds for r in records)
        if not seconds:
            return None
        rate = sum(r.flops for r in records) / seconds
        waiting = [o.job for o in self._open if not o.job.requests and not o.job.finished]
        rows = [row for job in [*waiting, *jobs] for row in self._rows(job)]
        rows += [(r.num_left, r.num_tokens) for r in engine.unfinished if r.num_left > 1 and not r.finished]
        model = engine.accounting.model
        pairs, keys = model.attended(rows)
        flops = model.cost(tokens=sum(count for count, _ in rows), samples=len(rows), pairs=pairs, keys=keys).flops
        return flops / rate + statistics.mean(r.seconds for r in records) + self._slot_wait(len(waiting) + len(jobs))

    def _rows(self, job: Job) -> list[tuple[int, int]]:
        """Tokens to compute, and the length they attend to, of a job that is not queued yet."""
        ids, pool = job.output.prompt_token_ids, self._engine.scoring_engine.memory.pools[0]
        salt = job.asked.cache_salt if job.asked is not None else ""
        known = pool.num_cached(pool.hashes(ids, salt)) * pool.page_size if pool.enable_prefix_caching else 0
        return [(max(1, len(ids) - known), len(ids))]

    def _slot_wait(self, num_new: int) -> float:
        """Seconds until so many more requests have slots, from what the running ones may still generate."""
        scheduler, slots = self._engine.scheduler, self._engine.runner.shapes.spare_slot
        running: list[Request] = list(scheduler.running)
        lacking = len(running) + scheduler.num_waiting + num_new - slots
        if lacking <= 0 or not running:
            return 0.0
        left = sorted(request.limit - request.num_tokens for request in running)
        return left[min(lacking, len(left)) - 1] * (self.predicted_tpot(0) or 0.0)

    def predicted_tpot(self, num_new: int) -> float | None:
        """Seconds per token with so many requests more, or None while no decode was measured.

        A line through recent iterations' seconds over the rows that decoded in them.
        """
        records = [r for r in _recent(self._engine) if r.num_decodes and r.num_sampled]
        if not records:
            return None
        rows = [float(r.num_decodes) for r in records]
        seconds = [r.seconds * r.num_decodes / r.num_sampled for r in records]
        now = len(self._engine.scheduler.running) + num_new
        if len({*rows}) < 2:
            return statistics.mean(seconds)
        slope, start = statistics.linear_regression(rows, seconds)
        return max(min(seconds), start + max(0.0, slope) * now)

    def _settle(self) -> None:
        """Compare predictions with what has come."""
        still_open = []
        for entry in self._open:
            job = entry.job
            if job.first_token is not None and entry.predicted is not None:
                actual = job.first_token - job.created
                self._errors.append(abs(entry.predicted - actual) / max(actual, 1e-6))
            elif not job.finished and job.first_token is None:
                still_open.append(entry)
        self._open = still_open

    def figures(self) -> list[Figure]:
        """For the one list of figures."""
        self._settle()
        text = "Requests refused because they would have missed the SLO."
        found = [Figure("slo_refused_requests", "counter", text, self.num_refused)]
        if self._errors:
            text = "Median relative error of the predicted time to first token."
            found.append(Figure("slo_ttft_prediction_error", "gauge", text, statistics.median(self._errors)))
        return found


def _recent(engine: Engine) -> list[IterationRecord]:
    return [record for record in list(engine.records)[-_WINDOW:] if not record.compiled]


def admission_of(engine: Any, slo: Mapping[str, float]) -> Admission | None:
    """What decides, where anything is promised."""
    return Admission(engine, slo) if slo else None
