"""Passes that look at a whole prompt and sample nothing: embeddings and prompt logprobs.

Token ids -> one vector, or every prompt token's log-probability. A pass takes pages from the pool, runs one chunk
at a time (so that decodes wait for one token budget at most) and gives the pages back. Knows nothing of text.

Dimension letters: T tokens of one chunk, D model width.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.runner.sampler import Sampled
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Chunk, IterationPlan

POOLINGS = ("mean", "last")


@dataclass(slots=True, eq=False)
class ScoringPass:
    """One prompt on its way. `pooling` None asks for logprobs, `mean` or `last` for a vector.

    Attributes:
        vector: float32 `[D]`, unnormalised, when done.
        scored: per chunk, the logprobs of tokens 1, 2, ... given those before.
    """

    token_ids: list[int]
    pooling: str | None = None
    start: int = 0
    pages: list[int] = field(default_factory=list)
    vector: np.ndarray | None = None
    scored: list[Sampled] = field(default_factory=list)
    cancelled: bool = False

    @property
    def done(self) -> bool:
        """Whether every token went through."""
        return self.start >= len(self.token_ids)


class Scorer:
    """Runs scoring passes on an engine's runner, one at a time, first come first served."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._queue: deque[ScoringPass] = deque()

    @property
    def has_work(self) -> bool:
        """Whether any pass is unfinished."""
        return bool(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    def check(self, token_ids: list[int]) -> None:
        """Raise ValueError where a pass could not run."""
        self._engine.check_prompt(token_ids, SamplingParams(max_tokens=1))
        pool = self._engine.pool
        if pool.pages_for(len(token_ids)) > pool.num_usable:
            raise ValueError(f"the input has {len(token_ids)} tokens, more than the KV cache holds; shorten it")

    def add(self, work: ScoringPass) -> None:
        """Queue a pass that `check` accepted."""
        self._queue.append(work)

    def step(self) -> ScoringPass | None:
        """Run one chunk; returns the pass it completed, if it did."""
        while self._queue and self._queue[0].cancelled:
            self._release(self._queue.popleft())
        if not self._queue or not self._get_pages(self._queue[0]):
            return None
        work = self._queue[0]
        self._run_chunk(work)
        self._engine.progress += 1
        self._engine.num_completed += 1
        if not work.done:
            return None
        self._release(self._queue.popleft())
        return work

    def reset(self) -> list[ScoringPass]:
        """Forget everything, after a failed step; returns what was lost."""
        lost = list(self._queue)
        for work in lost:
            self._release(work)
        self._queue.clear()
        return lost

    def _get_pages(self, work: ScoringPass) -> bool:
        if not work.pages:
            pages = self._engine.pool.allocate(self._engine.pool.pages_for(len(work.token_ids)))
            work.pages = pages or []
            self._engine.start_moves()
        return bool(work.pages)

    def _release(self, work: ScoringPass) -> None:
        self._engine.pool.free(work.pages)
        work.pages = []

    def _run_chunk(self, work: ScoringPass) -> None:
        runner = self._engine.runner
        count = min(runner.shapes.scoring_buckets[-1], len(work.token_ids) - work.start)
        request = Request("scoring", work.token_ids, SamplingParams(), limit=len(work.token_ids))
        request.slot, request.pages = runner.shapes.spare_slot, work.pages
        hidden_TD = runner.hidden_states(IterationPlan([Chunk(request, work.start, count, 0)]))
        if work.pooling is None:
            work.scored.append(self._score(work, hidden_TD, count))
        else:
            weights_T = _weights(work, count, hidden_TD.shape[0])
            vector = np.asarray(runner.pool(hidden_TD, weights_T))
            work.vector = vector if work.vector is None else work.vector + vector
        work.start += count

    def _score(self, work: ScoringPass, hidden_TD: Any, count: int) -> Sampled:
        targets_T = np.zeros(hidden_TD.shape[0], np.int32)
        known = work.token_ids[work.start + 1 : work.start + count + 1]
        targets_T[: len(known)] = known
        scored = self._engine.runner.score(hidden_TD, targets_T)
        assert scored.logprobs is not None and scored.top_ids is not None and scored.top_logprobs is not None
        parts = (scored.tokens, scored.logprobs, scored.top_ids, scored.top_logprobs)
        return Sampled(*(np.asarray(a)[: len(known)] for a in parts))  # type: ignore[arg-type]


def _weights(work: ScoringPass, count: int, size: int) -> np.ndarray:
    weights = np.zeros(size, np.float32)
    if work.pooling == "mean":
        weights[:count] = 1.0 / len(work.token_ids)
    elif work.start + count == len(work.token_ids):
        weights[count - 1] = 1.0
    return weights
