"""Admission by SLO: a request is refused early that would miss it.

Before a request is queued its time to first token is predicted (see `prediction`), with prefix hits taken off, and so
is the time per token. What 99 of 100 recent predictions were too short by is added before a limit is compared with
them. Off unless asked for; the error of the predictions is exported.
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
from jaxllm.entrypoints.prediction import Row, iteration_cost_of, prompt_seconds, slot_seconds, token_seconds
from jaxllm.scheduling.request import page_salt
from jaxllm.telemetry.figures import Figure

_WINDOW = 256  # predictions behind the error and the margin
_MARGIN_SHARE = 0.99
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
        self._seen: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # predicted, and what came

    def check(self, jobs: Sequence[Job]) -> None:
        """Note these jobs, which are about to be submitted. Raises Unavailable where they would miss the SLO."""
        self._settle()
        ttft, tpot = self.predicted_ttft(jobs), token_seconds(self._engine, len(jobs))
        for name, value, margin in (("ttft", ttft, self.margin), ("tpot", tpot, 0.0)):
            limit = self._slo.get(name)
            if value is not None and limit is not None and value + margin > limit:
                self.num_refused += 1
                wait = min(_MOST_RETRY_S, max(1, math.ceil(value + margin - limit)))
                raise Unavailable(
                    f"the {name} would be about {value + margin:.3g} s and the SLO is {limit:g} s; try again later or "
                    "elsewhere",
                    retry_after=wait,
                )
        self._open += [_Open(job, ttft) for job in jobs]

    @property
    def margin(self) -> float:
        """Seconds by which few recent first tokens came later than predicted."""
        late = sorted(actual - predicted for predicted, actual in list(self._seen))
        return max(0.0, late[min(len(late) - 1, int(_MARGIN_SHARE * len(late)))]) if late else 0.0

    def predicted_ttft(self, jobs: Sequence[Job]) -> float | None:
        """Seconds to the first token of the last of these jobs, or None while no prefill was measured."""
        engine = self._engine.scoring_engine  # of two pools the one that computes prompts
        if (pace := iteration_cost_of(engine)) is None:
            return None
        waiting = [o.job for o in self._open if not o.job.requests and not o.job.finished]
        before, new = ([self._row(job) for job in some] for some in (waiting, jobs))
        return prompt_seconds(engine, pace, before, new) + slot_seconds(self._engine, len(waiting) + len(jobs))

    def _row(self, job: Job) -> Row:
        """Of a job that is not queued yet: what its prompt's cached prefix leaves to compute."""
        ids, pool = job.output.prompt_token_ids, self._engine.scoring_engine.memory.pools[0]
        salt = page_salt(job.asked.cache_salt if job.asked is not None else "", job.adapter)
        known = pool.num_cached(pool.hashes(ids, salt)) * pool.page_size if pool.enable_prefix_caching else 0
        return max(1, len(ids) - known), len(ids)

    def _settle(self) -> None:
        """Compare predictions with what has come."""
        still_open = []
        for entry in self._open:
            job = entry.job
            if job.first_token is not None and entry.predicted is not None:
                self._seen.append((entry.predicted, job.first_token - job.created))
            elif not job.finished and job.first_token is None:
                still_open.append(entry)
        self._open = still_open

    def figures(self) -> list[Figure]:
        """For the one list of figures."""
        self._settle()
        text = "Requests refused because they would have missed the SLO."
        found = [Figure("slo_refused_requests", "counter", text, self.num_refused)]
        if self._seen:
            text = "Median relative error of the predicted time to first token."
            errors = [abs(predicted - actual) / max(actual, 1e-6) for predicted, actual in list(self._seen)]
            found.append(Figure("slo_ttft_prediction_error", "gauge", text, statistics.median(errors)))
        return found


def admission_of(engine: Any, slo: Mapping[str, float]) -> Admission | None:
    """What decides, where anything is promised."""
    return Admission(engine, slo) if slo else None
