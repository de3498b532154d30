"""Many models on few instances: whose turn it is decide the schedulers of `jaxllm.pool`, for servers and here alike.

An instance is a mesh that has one model's weights at a time. For each model that it serves it has an engine on paper,
all of them by one clock; a turn runs one of them. Switching takes the time that weights need from host memory, less
what was fetched while another model ran, and that which the KV cache of the model's running requests needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.pool.attainment import tokens_in_time
from jaxllm.pool.policies import Policy, Turn, make_policy
from jaxllm.roofline.iteration_time import IterationWork
from jaxllm.scheduling.request import Ending, Request
from jaxllm.simulation.arrivals import Arrival
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.fleet import Results, request_of
from jaxllm.simulation.outcomes import Outcome
from jaxllm.simulation.paper_engine import PaperEngine

MakeEngine = Callable[[str, VirtualClock], PaperEngine]


@dataclass(slots=True)
class PaperCosts:
    """See `jaxllm.pool.costs.Costs`: estimates from the same model of time.

    Attributes:
        engines: one of each model, to ask.
        weight_bytes: of each model, over all devices of an instance.
        bytes_per_s: from host memory to all devices of an instance.
    """

    engines: Mapping[str, PaperEngine]
    weight_bytes: Mapping[str, float]
    bytes_per_s: float
    lengths: dict[Hashable, int] = field(default_factory=dict)

    def prefill_seconds(self, model: str, item: Hashable) -> float:
        """See `Costs`."""
        length = self.lengths.get(item, 1)
        runner = self.engines[model].runner
        pairs, keys = runner.cost.attended([(length, length)])
        return runner.time.seconds(IterationWork("ragged", length, 1, pairs, keys, 0.0))

    def step_seconds(self, model: str, num_requests: int) -> float:
        """See `Costs`: with a thousand tokens in every cache."""
        runner = self.engines[model].runner
        _, keys = runner.cost.attended([(1, 1000)] * num_requests)
        return runner.time.seconds(IterationWork(runner.decode_program, num_requests, num_requests, 0, 0, keys))

    def switch_seconds(self, model: str) -> float:
        """See `Costs`."""
        return self.weight_bytes[model] / self.bytes_per_s

    def max_batch(self, model: str) -> int:
        """See `Costs`."""
        return self.engines[model].runner.shapes.max_num_seqs


@dataclass(slots=True)
class Member:
    """Listens to a request: its outcome, the times of all its tokens, and the scheduler hear of it."""

    outcome: Outcome
    model: str
    policy: Policy
    on_first: Callable[[], None]
    times: list[float] = field(default_factory=list)

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        """See `Listener`."""
        if not self.times:
            self.policy.prefilled(self)
            self.on_first()
        clock: Any = self.outcome.clock
        self.times += list(clock.ends) if len(clock.ends) else [clock.now] * len(tokens)
        return self.outcome.take(request, tokens, sampled, ending)

    def end(self, request: Request) -> None:
        """See `Listener`."""
        self.outcome.end(request)
        self.policy.end(self)

    def rewind(self, request: Request) -> bool:
        """See `Listener`."""
        return True

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Instance:
    """One mesh and its turns."""

    def __init__(self, number: int, policy: Policy, costs: PaperCosts, make_engine: MakeEngine, *, prefetch: bool):
        self.clock = VirtualClock()
        self.engines: dict[str, PaperEngine] = {}
        self.requests: dict[Member, Request] = {}
        self.num_switches, self.switching_s = 0, 0.0
        self._number, self._policy, self._costs, self._make = number, policy, costs, make_engine
        self._prefetch = prefetch
        self._turn: Turn | None = None
        self._held: str | None = None  # the model whose weights are here
        self._coming: tuple[str, float] | None = None  # a model that is being fetched, and since when
        self._unprefilled = 0
        self._ends_at = math.inf

    def run_until(self, time: float) -> None:
        """Take turns until then; a turn may last longer."""
        while self.clock.now < time:
            if self._turn is None and not self._begin():
                if not math.isinf(time):
                    self.clock.wait_until(time)
                return
            self._run(time)

    def _begin(self) -> bool:
        turn = self._policy.next_turn(self._number)
        if turn is None:
            return False
        self._switch_to(turn.model)
        self._turn = turn
        self._ends_at = math.inf
        self._unprefilled = 0
        self._start(turn.starts)
        if not self._unprefilled:
            self._prefilled()
        return True

    def _switch_to(self, model: str) -> None:
        if model != self._held:
            seconds = self._costs.switch_seconds(model)
            if self._coming is not None and self._coming[0] == model:
                seconds = max(0.0, seconds - (self.clock.now - self._coming[1]))
            seconds += self._cache_bytes(model) / self._costs.bytes_per_s
            self.clock.now += seconds
            self.num_switches += self._held is not None
            self.switching_s += seconds
            self._held, self._coming = model, None
        if model not in self.engines:
            self.engines[model] = self._make(model, self.clock)
        upcoming = self._policy.upcoming(self._number) if self._prefetch else []
        if upcoming and (self._coming is None or self._coming[0] != upcoming[0]):
            self._coming = (upcoming[0], self.clock.now)

    def _cache_bytes(self, model: str) -> float:
        """Of the requests that wait half-way."""
        if model not in self.engines:
            return 0.0
        paper = self.engines[model]
        return paper.runner.token_bytes * sum(request.num_tokens for request in paper.scheduling.running)

    def _start(self, items: Sequence[Hashable]) -> None:
        assert self._turn is not None
        for item in items:
            assert isinstance(item, Member)
            self._unprefilled += 1
            self._ends_at = math.inf
            item.on_first = self._first
            self.engines[self._turn.model].engine.add(self.requests.pop(item))

    def _first(self) -> None:
        self._unprefilled -= 1
        if not self._unprefilled:
            self._prefilled()

    def _prefilled(self) -> None:
        assert self._turn is not None
        self._ends_at = self.clock.now + self._turn.seconds

    def _run(self, time: float) -> None:
        """One step of the turn, or its end."""
        assert self._turn is not None
        paper = self.engines[self._turn.model]
        self._start(self._policy.joining(self._number))
        is_over = self.clock.now >= self._ends_at
        if paper.engine.has_work and not is_over:
            # when the turn ends is known once its prompts are prefilled: nothing may be skipped before
            paper.scheduling.horizon = self.clock.now if self._unprefilled else min(time, self._ends_at)
            paper.engine.step()
            return
        paper.scheduling.is_paused = True
        while paper.engine._in_flight:
            paper.engine.step()
        paper.scheduling.is_paused = False
        self._turn = None


class Pooled:
    """Instances that serve all models of a market, as one fleet.

    Args:
        models: names, each with the bytes of its weights.
        make_engine: an engine on paper for a model, by an instance's clock.
        num_instances: meshes.
        policy: token (Aegaeon) or request.
        bytes_per_s: from host memory into the devices of one instance.
        tbt: seconds between tokens that are promised.
        prefetch: whether the next model's weights are fetched while another runs.
    """

    def __init__(
        self,
        models: Mapping[str, float],
        make_engine: MakeEngine,
        *,
        num_instances: int,
        policy: str = "token",
        bytes_per_s: float,
        tbt: float = 0.1,
        prefetch: bool = True,
    ):
        self.models = list(models)
        self.samples = {name: make_engine(name, VirtualClock()) for name in models}
        self._costs = PaperCosts(self.samples, models, bytes_per_s)
        every = tuple(range(num_instances))
        self._policy = make_policy(policy, self._costs, prefill=every, decode=every, tbt=tbt)
        self._num_devices = next(iter(self.samples.values())).num_devices * num_instances
        self.instances = [
            Instance(number, self._policy, self._costs, make_engine, prefetch=prefetch) for number in every
        ]
        self.members: list[Member] = []

    @property
    def engines(self) -> list[PaperEngine]:
        """See `Fleet`; those that have run."""
        return [engine for instance in self.instances for engine in instance.engines.values()]

    @property
    def prompt_engines(self) -> list[PaperEngine]:
        """See `Fleet`."""
        return self.engines

    @property
    def num_devices(self) -> int:
        """See `Fleet`."""
        return self._num_devices

    def run_until(self, time: float) -> None:
        """See `Fleet`."""
        for instance in self.instances:
            instance.run_until(time)

    def send(self, arrival: Arrival, results: Results) -> None:
        """See `Fleet`."""
        assert arrival.model is not None, "a pool's request names its model"
        outcome = Outcome(arrival.at, arrival.input_len, arrival.output_len, self.instances[0].clock, results.gaps)
        member = Member(outcome, arrival.model, self._policy, lambda: None)
        self._costs.lengths[member] = arrival.input_len
        instance = self.instances[self._policy.add(member, arrival.model)]
        request = request_of(arrival, outcome)
        request.listener, outcome.clock = member, instance.clock
        instance.requests[member] = request
        results.outcomes.append(outcome)
        self.members.append(member)

    def attainment(self, *, ttft: float, tpot: float) -> float:
        """Share of all tokens that came by their deadlines; see `tokens_in_time`."""
        met = sum(tokens_in_time(m.outcome.at, m.times, ttft=ttft, tpot=tpot) for m in self.members)
        return met / max(1, sum(member.outcome.output_len for member in self.members))

    def figures(self, slo: Mapping[str, float]) -> dict[str, float]:
        """What a pool's report has beside others."""
        found: dict[str, float] = {
            "switches": sum(instance.num_switches for instance in self.instances),
            "switching_s": sum(instance.switching_s for instance in self.instances),
        }
        if {"ttft", "tpot"} <= slo.keys():
            found["token_attainment"] = self.attainment(ttft=slo["ttft"], tpot=slo["tpot"])
        return found
