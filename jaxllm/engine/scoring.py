"""Passes that look at a whole prompt and sample nothing: embeddings and prompt logprobs.

Token ids -> one vector, or every prompt token's log-probability. A pass takes pages from the pool, runs one chunk
at a time (so that decodes wait for one token budget at most) and gives the pages back. Knows nothing of text.

Dimension letters: T tokens of one chunk, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.engine.errors import NotFinite
from jaxllm.engine.outputs import CompletionDelta
from jaxllm.runner.sampler import Sampled
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Held, Request

POOLINGS = ("mean", "last")


@dataclass(slots=True, eq=False)
class ScoringPass:
    """One prompt on its way: a `Work`. `pooling` None asks for logprobs, `mean` or `last` for a vector.

    Attributes:
        vector: float32 `[D]`, unnormalised, when finished.
        choices: tokens one of which may come next; the pass finds their logprobs and nothing else.
        scored: per chunk, the logprobs of tokens 1, 2, ... given those before.
        chosen: the logprobs of the choices, when finished.
    """

    scorer: Scorer
    token_ids: list[int]
    pooling: str | None = None
    adapter: Adapter | None = None
    adapter_slot: int = 0
    choices: tuple[int, ...] = ()
    position: int = 0
    pages: list[int] = field(default_factory=list)
    vector: np.ndarray | None = None
    scored: list[Sampled] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    notify: Callable[[Any, CompletionDelta | None], None] | None = None
    error: Exception | None = None
    finished: bool = False

    @property
    def on_device(self) -> bool:
        """Whether the device holds anything of it."""
        return bool(self.pages)

    def start(self) -> None:
        """Queue it. Raises ValueError where it cannot run."""
        self.scorer.add(self)

    def abort(self) -> None:
        """End it now."""
        self.scorer.drop(self)

    def restart(self) -> None:
        """Begin again: the device has lost what was computed."""
        self.position, self.pages, self.vector, self.scored = 0, [], None, []
        self.adapter_slot, self.chosen = 0, []


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

    def check(self, token_ids: Sequence[int]) -> list[int]:
        """These ids as plain integers. Raises ValueError where a pass could not run."""
        known, pool = self._engine.check_prompt(token_ids), self._engine.pool
        if pool.pages_for(len(known)) > pool.num_usable:
            raise ValueError(f"the input has {len(known)} tokens, more than the KV cache holds; shorten it")
        return known

    def add(self, work: ScoringPass) -> None:
        """Queue a pass that `check` accepted."""
        self._queue.append(work)

    def drop(self, work: ScoringPass) -> None:
        """Take a pass out; one that is finished is not there any more."""
        if work in self._queue:
            self._engine.change(self._remove, work)

    def step(self) -> None:
        """Run one chunk of the oldest pass, if there is one."""
        if self._queue:
            self._engine.change(self._step, self._queue[0])

    def restart(self) -> None:
        """Begin every pass anew, after `Engine.recover`."""
        for work in self._queue:
            work.restart()

    def _step(self, work: ScoringPass) -> None:
        if not self._has_pages(work):
            return
        self._run_chunk(work)
        self._engine.progress += 1
        self._engine.num_completed += 1
        if not self._is_finite(work):
            work.error = NotFinite("numbers")
            self._engine.num_not_finite += 1
        elif work.position < len(work.token_ids):
            return
        if work.notify is not None:
            work.notify(work, None)
        self._remove(work)
        work.finished = True

    def _has_pages(self, work: ScoringPass) -> bool:
        slots = self._engine.scheduler.adapter_slots
        if not work.pages and slots.has_room(work.adapter):
            pages = self._engine.pool.allocate(self._engine.pool.pages_for(len(work.token_ids)))
            work.pages = pages or []
            if work.pages:
                work.adapter_slot = slots.hold(work.adapter)
            self._engine.start_moves()
        return bool(work.pages)

    def _remove(self, work: ScoringPass) -> None:
        if work.pages:
            self._engine.scheduler.adapter_slots.release(work.adapter)
        self._engine.pool.free(work.pages)
        work.pages = []
        self._queue.remove(work)

    def _is_finite(self, work: ScoringPass) -> bool:
        if work.choices:
            return bool(np.isfinite(work.chosen).all())
        if work.pooling is None:
            scored = work.scored[-1].logprobs
            return scored is None or bool(np.isfinite(scored).all())
        return work.vector is not None and bool(np.isfinite(work.vector).all())

    def _run_chunk(self, work: ScoringPass) -> None:
        runner = self._engine.runner
        count = min(runner.shapes.scoring_buckets[-1], len(work.token_ids) - work.position)
        request = Request("scoring", work.token_ids, SamplingParams(), limit=len(work.token_ids))
        request.held = Held(slot=runner.shapes.spare_slot, adapter_slot=work.adapter_slot, pages=work.pages)
        loads = self._engine.scheduler.adapter_slots.take_loads()
        hidden_TD = runner.hidden_states(IterationPlan([Chunk(request, work.position, count, 0)], loads=loads))
        if work.choices:
            if work.position + count == len(work.token_ids):
                work.chosen = self._choose(work, hidden_TD.shape[0], count - 1)
        elif work.pooling is None:
            work.scored.append(self._score(work, hidden_TD.shape[0], count))
        else:
            weights_T = _weights(work, count, hidden_TD.shape[0])
            vector = np.asarray(runner.pool(weights_T))
            work.vector = vector if work.vector is None else work.vector + vector
        work.position += count

    def _choose(self, work: ScoringPass, size: int, last: int) -> list[float]:
        """The logprob of each choice after the last token."""
        scored = [self._engine.runner.score(np.full(size, token, np.int32)).logprobs for token in work.choices]
        return [float(np.asarray(logprobs)[last]) for logprobs in scored]

    def _score(self, work: ScoringPass, size: int, count: int) -> Sampled:
        targets_T = np.zeros(size, np.int32)
        known = work.token_ids[work.position + 1 : work.position + count + 1]
        targets_T[: len(known)] = known
        scored = self._engine.runner.score(targets_T)
        assert scored.logprobs is not None and scored.top_ids is not None and scored.top_logprobs is not None
        parts = (scored.tokens, scored.logprobs, scored.top_ids, scored.top_logprobs)
        return Sampled(*(np.asarray(a)[: len(known)] for a in parts))  # type: ignore[arg-type]


def _weights(work: ScoringPass, count: int, size: int) -> np.ndarray:
    weights = np.zeros(size, np.float32)
    if work.pooling == "mean":
        weights[:count] = 1.0 / len(work.token_ids)
    elif work.position + count == len(work.token_ids):
        weights[count - 1] = 1.0
    return weights
