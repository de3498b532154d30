"""What arrives when: the rows of a trace, or lengths drawn alike at the times of a random process.

A file, or sizes and a rate -> `Arrival`s in the order of time, one at a time: nothing is held that has not come yet.
Everything wrong with a trace is one line with the number of its row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxllm.bench.workload import TRACE_BLOCK, Row, trace_rows

Process = Literal["poisson", "gamma", "uniform", "bursts"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at: seconds from the start.
        input_len, output_len: tokens.
        blocks: of the prompt, each `TRACE_BLOCK` tokens; equal ids are equal tokens. Empty: shared with nobody.
        number: its place in the workload.
        model: which of several models it asks for.
    """

    at: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    number: int = 0
    model: str | None = None

    @property
    def prompt(self) -> list[int]:
        """Token ids that are equal exactly where the blocks are."""
        if not self.blocks:
            return [-2 - self.number] * self.input_len
        ids = [block for block in self.blocks for _ in range(TRACE_BLOCK)]
        return ids[: self.input_len] + [-2 - self.number] * (self.input_len - len(ids))


def trace_arrivals(
    path: Path, num_requests: int | None, longest: int, *, scale: bool = False, skip_longer: bool = False
) -> Iterator[Arrival]:
    """A trace's requests at its own times; see `checked_rows` for what is refused.

    Args:
        path: .csv or .jsonl.
        num_requests: the first so many; None: all.
        longest: tokens of prompt and output together that the model takes.
        scale: shrink all lengths by one factor so that the longest just fits.
        skip_longer: leave out what does not fit.
    """
    rows = itertools.islice(checked_rows(path), num_requests)
    factor = 1.0
    if scale:
        kept = list(rows)
        factor = min(1.0, longest / max((prompt + output for _, prompt, output, _ in kept), default=1))
        rows = iter(kept)
    first = None
    for number, (at, prompt, output, blocks) in enumerate(rows):
        first = at if first is None else first
        if factor < 1.0:
            prompt, output = max(1, int(prompt * factor)), max(1, int(output * factor))
        if prompt + output > longest:
            if skip_longer:
                continue
            raise ValueError(
                f"--trace {path}, row {number + 1}: {prompt} + {output} tokens exceed the {longest} that a request may "
                "have; raise --max-model-len, or give --scale-lengths or --skip-longer"
            )
        yield Arrival(at - first, prompt, output, tuple(blocks), number)


def checked_rows(path: Path) -> Iterator[Row]:
    """Every row. Raises ValueError with its number where a length is not above 0 or a time comes before the last."""
    before = -math.inf
    for number, row in enumerate(trace_rows(path), 1):
        at, prompt, output, _ = row
        if prompt < 1 or output < 1:
            raise ValueError(f"--trace {path}, row {number}: lengths {prompt} and {output}; they must be at least 1")
        if not math.isfinite(at) or at < before:
            raise ValueError(
                f"--trace {path}, row {number}: arrives at {at:g} s, before the row above it ({before:g} s); "
                "sort it by time"
            )
        before = at
        yield row


def random_arrivals(
    num_requests: int, input_len: int, output_len: int, *, spread: float = 0.0, seed: int = 0
) -> Iterator[Arrival]:
    """Requests of these lengths, all due at once.

    `spread` draws each length from a log-normal distribution of that standard deviation (of the logarithm) about it.
    """
    random = np.random.default_rng((seed, 1))
    for number in range(num_requests):
        scale = np.exp(spread * random.standard_normal(2)) if spread else (1.0, 1.0)
        prompt, output = (max(1, round(length * s)) for length, s in zip((input_len, output_len), scale, strict=True))
        yield Arrival(0.0, prompt, output, number=number)


def at_rate(
    arrivals: Iterable[Arrival],
    rate: float,
    process: Process = "poisson",
    *,
    burstiness: float = 1.0,
    burst_size: int = 8,
    seed: int = 0,
) -> Iterator[Arrival]:
    """The same requests at `rate` per second on average.

    Args:
        arrivals: whose own times do not matter.
        rate: requests per second; infinite: all at once.
        process: poisson (exponential gaps), gamma (of shape `burstiness`: below 1 burstier than poisson), uniform
            (equal gaps), or bursts (`burst_size` at once, exponential gaps between bursts).
        burstiness, burst_size: see there.
        seed: of the gaps.
    """
    gap = _gaps(rate, process, burstiness, burst_size, seed)
    at = 0.0
    for number, arrival in enumerate(arrivals):
        at += gap(number) if number else 0.0
        yield dataclasses.replace(arrival, at=at)


def _gaps(rate: float, process: Process, burstiness: float, burst_size: int, seed: int) -> Callable[[int], float]:
    random = np.random.default_rng(seed)
    if math.isinf(rate):
        return lambda _: 0.0
    if process == "uniform":
        return lambda _: 1 / rate
    if process == "gamma":
        return lambda _: float(random.gamma(burstiness, 1 / (rate * burstiness)))
    if process == "bursts":
        return lambda number: 0.0 if number % burst_size else float(random.exponential(burst_size / rate))
    return lambda _: float(random.exponential(1 / rate))


def stretched(arrivals: Iterable[Arrival], factor: float) -> Iterator[Arrival]:
    """The same requests, `factor` times as far apart."""
    return (dataclasses.replace(arrival, at=arrival.at * factor) for arrival in arrivals)


def for_models(arrivals: Iterable[Arrival], models: Sequence[str], *, seed: int = 0) -> Iterator[Arrival]:
    """The same requests, each for one of the models at random."""
    random = np.random.default_rng((seed, 2))
    return (dataclasses.replace(arrival, model=models[int(random.integers(len(models)))]) for arrival in arrivals)
