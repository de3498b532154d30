"""What became of each request: a listener that notes times, and the gaps between tokens of all of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jaxllm.scheduling.request import Ending, Request


class Times(Protocol):
    """See `VirtualClock`."""

    @property
    def now(self) -> float: ...
    @property
    def first(self) -> float: ...
    @property
    def widest(self) -> float: ...


@dataclass(slots=True)
class Gaps:
    """Seconds between tokens: single ones, and arrays of those that several rows share."""

    single: array[float] = field(default_factory=lambda: array("f"))
    num_zero: int = 0  # tokens that came together with the one before
    shared: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def weighted(self) -> tuple[np.ndarray, np.ndarray]:
        """Values, and how often there is each."""
        values = [np.frombuffer(self.single, np.float32), np.zeros(1), *(gaps for gaps, _ in self.shared)]
        weights = [np.ones(len(self.single)), np.array([self.num_zero])]
        weights += [np.full(len(gaps), rows) for gaps, rows in self.shared]
        return np.concatenate(values), np.concatenate(weights)


@dataclass(slots=True)
class Outcome:
    """One request, from its arrival to its last token. It listens to the request.

    Attributes:
        at: when it arrived.
        clock: of the engine that runs it now.
        gaps: where the gaps between its tokens go.
        first, last: when its first and its last token came; nan: not yet.
        longest: the longest gap between its tokens.
        finished: when its answer was whole.
    """

    at: float
    num_prompt: int
    output_len: int
    clock: Times
    gaps: Gaps
    first: float = math.nan
    last: float = math.nan
    longest: float = 0.0
    num_tokens: int = 0
    num_cached: int = 0
    finished: float = math.nan

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        """See `Listener`."""
        clock = self.clock
        came = clock.first
        if self.num_tokens:
            gap = came - self.last
            self.gaps.single.append(gap)
            if gap > self.longest:
                self.longest = gap
        else:
            self.first = came
            self.num_cached = request.num_cached or 0
        count = len(tokens)
        if count > 1:
            self.longest = max(self.longest, clock.widest)
            if not clock.widest:  # they came together
                self.gaps.num_zero += count - 1
        self.num_tokens += count
        self.last = clock.now
        return ending

    def end(self, request: Request) -> None:
        """See `Listener`."""
        self.finished = self.clock.now

    def rewind(self, request: Request) -> bool:
        """See `Listener`: a simulation does not fail."""
        return True

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.at

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; nan where there is one."""
        return (self.finished - self.first) / (self.num_tokens - 1) if self.num_tokens > 1 else math.nan

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.finished - self.at

    def has_missed(self, slo: dict[str, float], now: float) -> bool:
        """Whether it is sure, as far as it has come, that it misses a limit."""
        if not math.isnan(self.finished):
            return not self.meets(slo)
        waited = (now if math.isnan(self.first) else self.first) - self.at
        return waited > slo.get("ttft", math.inf) or now - self.at > slo.get("e2e", math.inf)

    def meets(self, slo: dict[str, float]) -> bool:
        """Whether it ended within every limit: of ttft, tpot, itl (its longest gap) and e2e, in seconds."""
        if math.isnan(self.finished):
            return False
        values = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.longest, "e2e": self.e2e}
        return not any(values[name] > limit for name, limit in slo.items())
