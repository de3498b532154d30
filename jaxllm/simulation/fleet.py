"""Several engines on paper and the requests that come to them: arrivals in, outcomes out.

Before a request is handed to an engine, every engine has run up to its time. The engines know nothing of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.replicas import choose_part
from jaxllm.scheduling.request import Request
from jaxllm.simulation.arrivals import Arrival
from jaxllm.simulation.outcomes import Gaps, Outcome
from jaxllm.simulation.paper_engine import PaperEngine

_PARAMS = SamplingParams(temperature=0.0)
_LOOK_EVERY = 16  # arrivals


@dataclass(slots=True)
class Results:
    """What a fleet did.

    Attributes:
        outcomes: one for each request.
        gaps: between tokens, of all requests.
        num_devices: of the whole fleet.
        gave_up: not all was simulated, since too many requests had missed their limits already.
        duration_s: from the first arrival to the last token.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    gaps: Gaps = field(default_factory=Gaps)
    num_devices: int = 0
    num_rejected: int = 0
    gave_up: bool = False
    duration_s: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)


class Fleet(Protocol):
    """Engines that requests are sent to."""

    @property
    def engines(self) -> Sequence[PaperEngine]: ...

    @property
    def num_devices(self) -> int: ...

    @property
    def prompt_engines(self) -> Sequence[PaperEngine]:
        """Those that compute prompts: whose prefix caches count."""
        ...

    def run_until(self, time: float) -> None:
        """Everybody works up to that time (infinite: to the end)."""
        ...

    def send(self, arrival: Arrival, results: Results) -> None:
        """A request arrives."""
        ...

    def figures(self, slo: Mapping[str, float]) -> dict[str, float]:
        """What the report says of this kind of fleet alone, with limits in seconds."""
        ...


class Colocated:
    """Engines that each do all of a request: prefill and decode.

    Requests go where the longest prefix of theirs is cached, else to whoever has least to do: the rule of `Replicas`.
    """

    def __init__(self, engines: Sequence[PaperEngine], *, streamed: bool = True):
        self.engines = self.prompt_engines = engines
        self._streamed = streamed
        self.num_devices = sum(engine.num_devices for engine in engines)
        self._slack = max(1, engines[0].runner.shapes.max_num_seqs // 4)

    def run_until(self, time: float) -> None:
        """See `Fleet`."""
        for engine in self.engines:
            run_until(engine, time)

    def send(self, arrival: Arrival, results: Results) -> None:
        """See `Fleet`."""
        outcome = Outcome(arrival.at, arrival.input_len, arrival.output_len, self.engines[0].clock, results.gaps)
        request = request_of(arrival, outcome, streamed=self._streamed)
        engine = self._chosen(request)
        outcome.clock = engine.clock
        results.outcomes.append(outcome)
        engine.engine.add(request)

    def figures(self, slo: Mapping[str, float]) -> dict[str, float]:
        """See `Fleet`."""
        return {}

    def _chosen(self, request: Request) -> PaperEngine:
        if len(self.engines) == 1:
            return self.engines[0]
        pools = [engine.scheduling.pool for engine in self.engines]
        loads = [engine.load for engine in self.engines]
        return self.engines[choose_part(request, loads, pools, self._slack)]  # type: ignore[arg-type]


def request_of(arrival: Arrival, outcome: Outcome, *, streamed: bool = True, limit: int | None = None) -> Request:
    """The request of an arrival, which nobody has yet."""
    prompt = arrival.prompt
    return Request(
        f"{arrival.number}",
        prompt,
        _PARAMS,
        limit or len(prompt) + arrival.output_len,
        streamed=streamed,
        listener=outcome,
    )


def run_until(paper: PaperEngine, time: float) -> None:
    """Step an engine until its clock shows that time or it has nothing to do."""
    engine, clock = paper.engine, paper.clock
    paper.scheduling.horizon = time
    while clock.now < time and engine.has_work:
        engine.step()
    if not engine.has_work and not math.isinf(time):
        clock.wait_until(time)


def simulate(
    fleet: Fleet,
    arrivals: Iterable[Arrival],
    on_sent: Callable[[int], object] = lambda _: None,
    is_lost: Callable[[Results, float], bool] = lambda results, now: False,
) -> Results:
    """Send every request at its time and run to the end of all.

    Args:
        fleet: runs them.
        arrivals: in the order of time.
        on_sent: told of each that was sent.
        is_lost: asked now and then, with what has become of them and the time, whether the rest can be left out.
    """
    results = Results(num_devices=fleet.num_devices)
    for number, arrival in enumerate(arrivals, 1):
        fleet.run_until(arrival.at)
        if number % _LOOK_EVERY == 0 and is_lost(results, arrival.at):
            results.gave_up = True
            break
        fleet.send(arrival, results)
        on_sent(1)
    if not results.gave_up:
        fleet.run_until(math.inf)
    for engine in fleet.engines:
        results.gaps.shared += engine.runner.gaps
    starts = [outcome.at for outcome in results.outcomes]
    ends = [outcome.finished for outcome in results.outcomes if not math.isnan(outcome.finished)]
    results.duration_s = max(ends, default=0.0) - min(starts, default=0.0)
    return results
