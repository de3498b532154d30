"""How long this device's iterations last: a grid of them is measured through the engine's own loop, and fitted.

An engine -> a `Profile`. Batches of decodes over sizes and contexts, one token at a time and in loops; prompts over
lengths; prompts that arrive among decodes. Every iteration's time is that between its results and those before, so the
host's share is in it. For each compiled program and bucket a sum of terms is fitted, none negative, to relative errors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.roofline.iteration_time import LOOP, RAGGED, IterationWork
from jaxllm.roofline.profile import Profile, Terms
from jaxllm.runner.interface import Work
from jaxllm.runner.shapes import bucket_for
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.telemetry.accounting import Accounting
from jaxllm.telemetry.device_peaks import engine_cost, measured_ceilings
from jaxllm.telemetry.iteration_work import iteration_work, program_of

if TYPE_CHECKING:
    from jaxllm.entrypoints.llm import LLM
    from jaxllm.runner.runner import ModelRunner
    from jaxllm.runner.sampler import Sampled
    from jaxllm.scheduling.request import Request
    from jaxllm.telemetry.drafts import LoopDrafts

_DECODES = 12  # iterations of each decode point
_FILLED = 0.95  # of the cache, at most
_LEAST = 6  # measurements that a bucket needs
_REWEIGHTINGS = 30
_EXACT = 0.005  # relative errors below this one weigh alike
_SETTINGS = (
    "max_model_len max_num_seqs max_num_batched_tokens page_size max_decode_steps mesh sharding_rules dtype kv_dtype "
    "enable_prefix_caching"
).split()


@dataclass(frozen=True, slots=True)
class Measured:
    """One iteration: of a loop's steps the average."""

    work: IterationWork
    bucket: int
    seconds: float


class Recorder:
    """A runner that notes how long each plan of another runner took."""

    def __init__(self, inner: ModelRunner):
        self.inner = inner
        self.model, self.shapes, self.memory = inner.model, inner.shapes, inner.memory
        self.now, self.reset = inner.now, inner.reset
        self.measured: list[Measured] = []
        self._cost = engine_cost(inner.model, inner.shapes.kv_dtype)
        self._last, self._num_compilations = 0.0, 0

    @property
    def num_compilations(self) -> int:
        """See `Runner`."""
        return self.inner.num_compilations

    @property
    def num_compilations_after_warmup(self) -> int:
        """See `Runner`."""
        return self.inner.num_compilations_after_warmup

    def dispatch(self, plan: IterationPlan) -> Recorded:
        """See `Runner`."""
        return Recorded(self.inner.dispatch(plan), self)

    def record(self, work: Work) -> None:
        """A plan's results are here."""
        now = self.now()
        seconds = now - max(work.dispatched, self._last)
        compiled = self.num_compilations > self._num_compilations
        self._last, self._num_compilations = now, self.num_compilations
        if not compiled:
            self.measured.append(self._as_measured(work.plan, seconds))

    def _as_measured(self, plan: IterationPlan, seconds: float) -> Measured:
        program, steps = program_of(plan), plan.num_steps
        parts: dict[int, list] = defaultdict(list)
        for chunk in plan.chunks:
            parts[chunk.request.replica].append(chunk)
        works = [
            iteration_work(part, program, self._cost, step=(steps - 1) // 2, admitted=len(plan.admitted))
            for part in parts.values()
        ]
        work = max(works, key=lambda work: (work.tokens, work.decode_keys))  # replicas end together
        sizes = self.shapes.token_buckets if program == RAGGED else self.shapes.row_buckets
        return Measured(work, bucket_for(work.tokens, sizes), seconds / steps)


@dataclass(frozen=True, slots=True)
class Recorded:
    """Work whose reading is noted."""

    inner: Work
    recorder: Recorder

    @property
    def plan(self) -> IterationPlan:
        """See `Work`."""
        return self.inner.plan

    @property
    def dispatched(self) -> float:
        """See `Work`."""
        return self.inner.dispatched

    @property
    def is_ready(self) -> bool:
        """See `Work`."""
        return self.inner.is_ready

    def read(self) -> Sequence[tuple[Chunk, Sampled]]:
        """See `Work`."""
        results = self.inner.read()
        self.recorder.record(self.inner)
        return results

    def drafts(self) -> LoopDrafts | None:
        """See `Work`."""
        return self.inner.drafts()


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the grid: `rows` requests that decode after `context` tokens, then `count` prompts of `prompt`."""

    rows: int = 0
    context: int = 0
    streamed: bool = True
    prompt: int = 0
    count: int = 1


def grid(*, rows: Sequence[int], longest: int, capacity: int, budget: int) -> Iterator[Point]:
    """The points that fit into a cache of `capacity` tokens and requests of `longest`.

    Decodes are measured with full and with three quarters of each bucket's `rows`, and with contexts up to what the
    cache holds: a simulation meets full caches, and a slope that was fitted to short contexts alone is wrong there.
    """
    spare = 4 * _DECODES + capacity // budget  # tokens that a row may grow by
    most = int(_FILLED * capacity)
    for count in sorted({*rows, *(3 * bucket // 4 for bucket in rows)} - {0}):
        longest_context = min(longest, most // count) - spare
        shortest = min(16, longest_context)
        contexts = sorted(
            {shortest, longest_context // 3 if count in rows else shortest, longest_context}, reverse=True
        )
        for context, streamed in itertools.product((c for c in contexts if c > 0), (True, False)):
            yield Point(count, context, streamed)
        for length, is_long in ((24, True), (96, False), (budget - budget // 4, True), (2 * budget, False)):
            context = min(longest, (most - length) // count) - spare if is_long else 64
            if count in rows and context > 0 and length <= longest and count * (context + spare) + length <= most:
                yield Point(count, context, True, length)
    lengths = (4, 12, 24, 48, 64, 96, 128, 192, 256, budget // 2, budget, 2 * budget, 4 * budget)
    for length in sorted({n for n in lengths if n < longest and n <= most}):
        yield Point(prompt=length)
        if 4 * length <= min(budget, most // 2):
            yield Point(prompt=length, count=4)


def calibrate(llm: LLM, *, num_iters: int = 2, on_point: Callable[[int, int], None] = lambda done, of: None) -> Profile:
    """Measure and fit.

    Args:
        llm: the engine; nothing else may use it meanwhile.
        num_iters: rounds over the grid.
        on_point: told how many points of how many are done.

    Raises:
        ValueError: a program was too seldom measured.
    """
    runner, memory = llm.engine.runner, llm.engine.memory
    runner.warm_up(sampling=False)
    ceilings = llm.engine.accounting.ceilings or measured_ceilings(runner.model)
    recorder, books = Recorder(runner), llm.engine.accounting
    engine = Engine(
        recorder, memory=memory, scheduling=llm.engine.scheduler, accounting=Accounting(books.model, ceilings)
    )
    shapes = runner.shapes
    capacity = memory.pools[0].num_usable * shapes.page_size
    points = (
        list(
            grid(
                rows=shapes.row_buckets,
                longest=shapes.max_model_len,
                capacity=capacity,
                budget=shapes.max_num_batched_tokens,
            )
        )
        * num_iters
    )
    prompts = Prompts(shapes.vocab_size)
    for done, point in enumerate([Point(1, 16), *points]):
        if done == 1:
            recorder.measured.clear()
        run_point(engine, point, prompts)
        on_point(done, len(points))
    settings = {name: getattr(llm.config, name) for name in _SETTINGS}
    settings |= {"max_model_len": shapes.max_model_len, "num_pages": shapes.num_pages}
    settings["max_num_batched_tokens"] = shapes.max_num_batched_tokens
    mesh = runner.model.placement.mesh
    return Profile(
        device=f"{ceilings.source} ({mesh.devices.flat[0].device_kind})",
        model=llm.config.model,
        num_devices=mesh.size,
        flops_per_s=ceilings.flops_per_s,
        bytes_per_s=ceilings.bytes_per_s,
        programs=fit_all(recorder.measured),
        engine=settings,
    )


class Prompts:
    """Token ids: new ones, or those of a row, of which a longer prompt begins as a shorter one does.

    So the prefix cache has most of what the next point decodes after, and filling the cache takes no time again.
    """

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(0)

    def new(self, length: int) -> list[int]:
        """Nobody has seen these."""
        return self._random.integers(0, self._vocab_size, length).tolist()

    def of_row(self, row: int, length: int) -> list[int]:
        """The first of a row's own."""
        return np.random.default_rng((1, row)).integers(0, self._vocab_size, length).tolist()


def run_point(engine: Engine, point: Point, prompts: Prompts) -> None:
    """Run one point to its end."""

    def add(ids: list[int], max_tokens: int, streamed: bool) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return engine.add_request(ids, params, streamed=streamed)

    # Rows that came first decode while others' prompts are computed; loops follow streams of the same rows, now cached.
    filling = point.rows * point.context // engine.runner.shapes.max_num_batched_tokens  # iterations, at most
    tokens = filling + _DECODES if point.streamed else 2 * _DECODES
    decoding = [add(prompts.of_row(row, point.context), tokens, point.streamed) for row in range(point.rows)]
    if point.prompt:
        while any(len(request.token_ids) == request.num_prompt for request in decoding):
            engine.step()
        for _ in range(point.count):
            add(prompts.new(point.prompt), 1, True)
    while engine.has_work:
        engine.step()


def fit_all(measured: Sequence[Measured]) -> dict[str, dict[int, Terms]]:
    """Terms of every program and bucket. Raises ValueError where there are too few measurements."""
    groups: dict[tuple[str, int], list[Measured]] = defaultdict(list)
    for one in measured:
        groups[one.work.program, one.bucket].append(one)
    programs: dict[str, dict[int, Terms]] = defaultdict(dict)
    for (program, bucket), group in sorted(groups.items()):
        if len(group) >= _LEAST:
            programs[program][bucket] = fit(group)
    if RAGGED not in programs:
        raise ValueError("too few iterations were measured; give more --num-iters")
    for program in ("decode", LOOP):
        programs.setdefault(program, programs["decode"] or programs[RAGGED])
    return dict(programs)


def fit(group: Sequence[Measured]) -> Terms:
    """The terms, none negative, with the least sum of absolute relative errors: a few odd iterations cost nothing.

    By iteratively reweighted least squares. Errors are relative to what is longer, measured or fitted: one that was
    read late makes the next look short, and relative to that alone its error would outweigh all others.
    """
    from scipy.optimize import nnls

    works, seconds = [one.work for one in group], np.array([one.seconds for one in group])
    features = np.array([(1, w.tokens, w.chunk_pairs, w.decode_keys, w.admitted) for w in works], float)
    scale = np.maximum(features.max(axis=0), 1e-30) / np.median(seconds)
    features /= scale
    longer, weights = np.maximum(seconds, np.median(seconds) / 2), np.ones(len(group))
    solution = np.zeros(features.shape[1])
    for _ in range(_REWEIGHTINGS):
        solution, _ = nnls(features * (weights / longer)[:, None], seconds * weights / longer)
        fitted = features @ solution
        longer = np.maximum(seconds, fitted)
        weights = np.maximum(np.abs(fitted - seconds) / longer, _EXACT) ** -0.5
    return Terms(*(solution / scale).tolist())


def format_report(profile: Profile) -> str:
    """A line per program and bucket for a person."""
    lines = [f"{profile.model} on {profile.device}", f"{'program':<8}{'bucket':>7}{'base ms':>9}{'us/token':>10}"]
    for program, buckets in profile.programs.items():
        for bucket, terms in buckets.items():
            lines.append(f"{program:<8}{bucket:>7}{1e3 * terms.base:>9.2f}{1e6 * terms.tokens:>10.1f}")
    return "\n".join(lines)


def as_json(profile: Profile) -> dict[str, Any]:
    """For `--json`."""
    return dataclasses.asdict(profile)
