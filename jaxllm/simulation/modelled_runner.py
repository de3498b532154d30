"""A runner that computes nothing: a plan -> how long a device would take, and tokens that mean nothing.

It stands where `ModelRunner` does, under the engine's own loop: iterations queue on a modelled device, reading one
turns the clock to its end. Knows nothing of who runs next.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.roofline.cost_model import ModelCost
from jaxllm.roofline.iteration_time import DECODE, RAGGED, IterationTime, IterationWork
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.paper_drafts import PaperDrafts
from jaxllm.simulation.paper_memory import PaperMemory
from jaxllm.telemetry.drafts import LoopDrafts
from jaxllm.telemetry.iteration_work import iteration_work, program_of


class Tokens:
    """So many sampled tokens, all alike: what an engine asks of an array of them."""

    def __init__(self, count: int):
        self._tokens = [0] * count

    def __len__(self) -> int:
        return len(self._tokens)

    def tolist(self) -> list[int]:
        """A list of its own for each caller."""
        return self._tokens[:]


@dataclass(frozen=True, slots=True)
class ModelledSample:
    """In the place of `Sampled`: tokens, nothing else."""

    tokens: Tokens


@functools.cache
def sample_of(count: int) -> Any:
    """The same object for every row that samples so many tokens."""
    return ModelledSample(Tokens(count))


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A configuration is all there is of it."""

    cfg: ModelConfig


@dataclass(frozen=True, slots=True)
class ModelledWork:
    """A plan on the modelled device's queue.

    Attributes:
        dispatched: when, by the clock.
        ends: when each of its iterations ends.
        runner: whose clock it turns.
        skipped: its steps are iterations of their own, run without looking up because nothing would have changed.
        counts: tokens of each chunk, where they are not all that were planned.
        tried: what became of drafts, where there may have been some.
    """

    plan: IterationPlan
    dispatched: float
    ends: np.ndarray
    runner: ModelledRunner
    skipped: bool = False
    counts: Sequence[int] | None = None
    tried: LoopDrafts | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the clock has passed the end of it."""
        return self.runner.clock.now >= float(self.ends[-1])

    def read(self) -> Sequence[tuple[Chunk, Any]]:
        """Turn the clock to the end of it."""
        clock, chunks = self.runner.clock, self.plan.chunks
        end = float(self.ends[-1])
        clock.wait_until(end)
        clock.first, clock.widest, clock.ends = clock.now, 0.0, ()
        if self.skipped and len(self.ends) > 1:
            gaps = np.diff(self.ends)
            clock.first, clock.widest = float(self.ends[0]), float(gaps.max())
            clock.ends = self.ends  # type: ignore[assignment]
            self.runner.gaps.append((gaps, len(chunks)))
        if self.counts is None:
            return [(chunk, sample_of(chunk.num_samples)) for chunk in chunks if chunk.num_samples]
        sampled = zip(chunks, self.counts, strict=True)
        return [(chunk, sample_of(count)) for chunk, count in sampled if chunk.num_samples]

    def drafts(self) -> LoopDrafts | None:
        """See `Work`."""
        return self.tried


class ModelledRunner:
    """See `jaxllm.runner.interface.Runner`.

    Args:
        model: what would run.
        shapes: sizes of the engine.
        memory: page pools.
        cost: of one replica's model: gives pairs and keys of rows.
        time: how long an iteration lasts.
        clock: the host's.
        host_s: host time per iteration.
        drafts: what becomes of drafts, where the shapes have some.
    """

    num_compilations = 0
    num_compilations_after_warmup = 0

    def __init__(
        self,
        model: PaperModel,
        shapes: RunnerShapes,
        memory: PaperMemory,
        *,
        cost: ModelCost,
        time: IterationTime,
        clock: VirtualClock,
        host_s: float,
        drafts: PaperDrafts | None = None,
    ):
        self.model, self.shapes, self.memory = model, shapes, memory
        self.clock = clock
        self.host_s = host_s
        self.free_at = 0.0  # when the device has done all that was dispatched
        self.busy_s = self.last_seconds = 0.0  # of all iterations, and of the last
        self.num_iterations = 0
        self.skipping = False  # the next plan's steps are iterations of their own
        self.gaps: list[tuple[np.ndarray, int]] = []  # between the tokens of skipped iterations, and of how many rows
        self.cost, self.time, self.drafts = cost, time, drafts
        self._has_windows = any(window is not None for window, _ in cost.attention)

    @property
    def decode_program(self) -> str:
        """What an iteration of decodes alone runs."""
        return DECODE if self.shapes.max_decode_steps else RAGGED

    @property
    def token_bytes(self) -> float:
        """Of one token in the cache, over all layers and devices."""
        return self.cost.kv_bytes * self.model.cfg.num_layers

    def now(self) -> float:
        """See `Runner`."""
        return self.clock.now

    def reset(self) -> None:
        """See `Runner`: there is nothing to forget."""

    def dispatch(self, plan: IterationPlan) -> ModelledWork:
        """See `Runner`."""
        skipped, self.skipping = self.skipping, False
        self.clock.now += self.host_s
        if self.drafts is not None:
            return self._with_drafts(plan, self.drafts)
        program = self.decode_program if skipped else program_of(plan)
        durations = self.durations(plan.chunks, plan.num_steps, program, len(plan.admitted))
        if skipped:
            durations = np.maximum(durations, self.host_s)
        ends = self._queued(durations)
        self.num_iterations += plan.num_steps if skipped else 1
        return ModelledWork(plan, self.clock.now, ends, self, skipped)

    def _queued(self, durations: np.ndarray) -> np.ndarray:
        """When iterations end that come after all that was dispatched."""
        ends = max(self.clock.now, self.free_at) + np.cumsum(durations)
        self.free_at, self.last_seconds = float(ends[-1]), float(durations[-1])
        self.busy_s += float(durations.sum())
        return ends

    def _with_drafts(self, plan: IterationPlan, drafts: PaperDrafts) -> ModelledWork:
        """A plan of an engine that speculates: how many tokens come is drawn, as long as the request may grow."""
        self.num_iterations += 1
        lengths = drafts.begin(plan)
        before = lengths[:]
        if plan.is_decode_loop:
            durations, tried = self._loop(plan, lengths, drafts)
        else:
            durations, tried = self.durations(plan.chunks, 1, program_of(plan), len(plan.admitted)), None
            for i, chunk in enumerate(plan.chunks):
                lengths[i] += int(chunk.num_samples > 0 and lengths[i] < chunk.request.limit)
        drafts.sampled(plan.chunks, lengths)
        counts = [length - first for length, first in zip(lengths, before, strict=True)]
        return ModelledWork(plan, self.clock.now, self._queued(durations), self, counts=counts, tried=tried)

    def _loop(self, plan: IterationPlan, lengths: list[int], drafts: PaperDrafts) -> tuple[np.ndarray, LoopDrafts]:
        """Seconds of each of a loop's iterations, and what became of drafts; `lengths` grow."""
        chunks, durations, num_verifying = plan.chunks, [], 0
        tried: list[tuple[Chunk, list[int], list[int]]] = [(chunk, [], []) for chunk in chunks]
        for _ in range(plan.num_steps):
            active = [i for i, chunk in enumerate(chunks) if lengths[i] < chunk.request.limit]
            most = max([chunks[i].num_drafts for i in active], default=0)
            rows = [chunks[i] for i in active], [lengths[i] for i in active]
            count = drafts.worth(most, lambda count, rows=rows: self._verifying(*rows, count)) if most else 0
            durations.append(self._verifying(*rows, count))
            counts = [min(count, chunks[i].num_drafts, chunks[i].request.limit - lengths[i] - 1) for i in active]
            num_verifying += any(counts)
            for i, num_drafted, num_right in zip(active, counts, drafts.accepted(counts), strict=True):
                lengths[i] += 1 + num_right
                tried[i][1].append(num_drafted)
                tried[i][2].append(num_right)
        return np.array(durations), LoopDrafts(tried, len(chunks), plan.num_steps, num_verifying)

    def _verifying(self, chunks: Sequence[Chunk], lengths: Sequence[int], count: int) -> float:
        """Seconds of an iteration in which each of these rows has so many drafts."""
        parts: dict[int, list[tuple[int, int]]] = {}
        for chunk, length in zip(chunks, lengths, strict=True):
            parts.setdefault(chunk.request.replica, []).append((1, length))
        seconds = [0.0]
        for rows in parts.values():
            _, keys = self.cost.attended(rows)
            tokens = len(rows) * (1 + count)
            seconds.append(self.time.seconds(IterationWork(DECODE, tokens, tokens, (1 + count) * keys, keys, 0)))
        return max(seconds)

    def durations(self, chunks: Sequence[Chunk], steps: int, program: str, admitted: int = 0) -> np.ndarray:
        """Seconds of each of `steps` iterations of these chunks, every row one token longer each time."""
        if len(self.memory.pools) == 1:
            return self._durations(chunks, steps, program, admitted)
        parts: list[list[Chunk]] = [[] for _ in self.memory.pools]
        for chunk in chunks:
            parts[chunk.request.replica].append(chunk)
        # Replicas run one program: they end together.
        return np.max([self._durations(part, steps, program, admitted) for part in parts if part], axis=0)

    def _durations(self, chunks: Sequence[Chunk], steps: int, program: str, admitted: int) -> np.ndarray:
        """Those of one replica."""
        if steps == 1:
            return np.array([self._seconds(chunks, 0, program, admitted)])
        if self._has_windows or any(chunk.num_samples != steps for chunk in chunks):
            return np.array([self._seconds(chunks, step, program) for step in range(steps)])
        first, last = (self._seconds(chunks, step, program) for step in (0, steps - 1))
        return np.linspace(first, last, steps)  # an iteration's time is linear in its decode keys

    def _seconds(self, chunks: Sequence[Chunk], step: int, program: str, admitted: int = 0) -> float:
        if step:
            chunks = [chunk for chunk in chunks if chunk.num_samples > step]
        work = iteration_work(chunks, program, self.cost, step=step, admitted=admitted)
        return self.time.seconds(work) if chunks else 0.0
