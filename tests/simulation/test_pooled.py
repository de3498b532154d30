"""Models that take turns on an instance, by the schedulers of `jaxllm.pool`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.simulation.arrivals import Arrival
from jaxllm.simulation.fleet import simulate
from jaxllm.simulation.paper_engine import paper_engine
from jaxllm.simulation.pooled import Pooled
from tests.simulation.test_fleet import H100, MODEL

WEIGHTS = 16e9


def pool(num_models: int, policy: str = "token", **kwargs) -> Pooled:
    config = EngineConfig(
        model="llama-3.1-8b",
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        max_model_len=8192,
        kv_cache_memory_bytes=4 << 30,
    )
    models = {f"m{i}": WEIGHTS for i in range(num_models)}
    settings = {"num_instances": 1, "bytes_per_s": 64e9} | kwargs
    return Pooled(models, lambda _, clock: paper_engine(config, MODEL, H100, clock=clock), policy=policy, **settings)


def market(num_models: int, rate: float, count: int, output_len: int = 100) -> list[Arrival]:
    random = np.random.default_rng(0)
    times = np.cumsum(random.exponential(1 / rate, count)).tolist()
    models = random.integers(0, num_models, count).tolist()
    return [Arrival(t, 300, output_len, number=i, model=f"m{models[i]}") for i, t in enumerate(times)]


@pytest.mark.parametrize("policy", ["token", "request"])
def test_every_request_of_every_model_ends(policy):
    fleet = pool(4, policy)
    results = simulate(fleet, market(4, 3.0, 40))
    assert all(outcome.num_tokens == 100 for outcome in results.outcomes)
    assert all(len(m.times) == 100 and m.times == sorted(m.times) for m in fleet.members)
    assert len(fleet.engines) == 4 and fleet.num_devices == 1


def test_a_switch_takes_as_long_as_its_weights():
    arrivals = [Arrival(0.0, 300, 20, number=0, model="m0"), Arrival(10.0, 300, 20, number=1, model="m1")]
    first, second = simulate(pool(2, prefetch=False), arrivals).outcomes
    alone = simulate(pool(1), [dataclasses.replace(arrivals[0])]).outcomes[0].ttft
    assert second.ttft == pytest.approx(first.ttft, rel=1e-6) and first.ttft == pytest.approx(alone)
    assert WEIGHTS / 64e9 < second.ttft < WEIGHTS / 64e9 + 0.1


def test_a_turn_that_prefills_ends_with_its_prompts_while_another_model_waits():
    arrivals = [Arrival(0.0, 300, 2000, number=i, model=f"m{i}") for i in range(2)]
    first, second = simulate(pool(2, prefetch=False), arrivals).outcomes
    alone = simulate(pool(1), [dataclasses.replace(arrivals[0])]).outcomes[0].ttft
    steps = 4 * first.tpot  # a few are on their way when its first token is known
    assert second.ttft <= 2 * alone + WEIGHTS / 64e9 + steps


def test_two_requests_of_one_name_are_refused_and_nothing_waits_for_the_lost_one():
    arrivals = [Arrival(0.0, 300, 20, model="m0"), Arrival(0.0, 300, 20, model="m0")]
    with pytest.raises(ValueError, match="already in use"):
        simulate(pool(1), arrivals)


def test_turns_between_tokens_keep_more_promises_than_turns_between_requests():
    in_time = {}
    for policy in ("token", "request"):
        results = simulate(pool(8, policy), market(8, 1.5, 80, output_len=700))
        in_time[policy] = sum(outcome.meets({"ttft": 5.0, "tpot": 0.1}) for outcome in results.outcomes)
    assert in_time["token"] > in_time["request"] + 10
