"""Engines on paper: the times they show follow from arithmetic, and skipping ahead changes nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.families.presets import preset
from jaxllm.roofline.chips import CHIPS
from jaxllm.roofline.iteration_time import Efficiency
from jaxllm.simulation import steering
from jaxllm.simulation.arrivals import Arrival, at_rate, random_arrivals
from jaxllm.simulation.fleet import Colocated, simulate
from jaxllm.simulation.level import Level
from jaxllm.simulation.paper_engine import Hardware, Policy, paper_engine
from jaxllm.simulation.policies import POLICIES
from jaxllm.simulation.report import make_report, weighted_percentiles

MODEL = preset("llama-3.1-8b")
PERFECT = Hardware(chip=CHIPS["h100"], efficiency=Efficiency(compute=1.0, memory=1.0, collective_s=0.0, host_s=0.0))

H100 = Hardware(chip=CHIPS["h100"])


def engine(hardware: Hardware = H100, policy: str | Policy | None = "chunked", **settings: Any):
    settings = {
        "model": "llama-3.1-8b",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 8192,
    } | settings
    return paper_engine(
        EngineConfig(**settings), MODEL, hardware, policy=POLICIES[policy] if isinstance(policy, str) else policy
    )


def run(engines, arrivals, **kwargs):
    fleet = Colocated(engines, **kwargs)
    results = simulate(fleet, arrivals)
    return results, make_report(results, fleet, slo={"ttft": 2.0, "tpot": 0.05})


def test_one_request_takes_what_its_bytes_and_operations_take():
    paper = engine(PERFECT)
    results, report = run([paper], [Arrival(0.0, 512, 3)])
    (outcome,) = results.outcomes
    weights, kv = 2 * (MODEL.num_parameters - 128256 * 4096), 2 * 2 * 8 * 128 * 32
    matrices = MODEL.num_parameters - 2 * 128256 * 4096
    products = (2 * matrices * 512 + 2 * 128256 * 4096) / 990e12
    attention = 4 * 4096 * 32 * (512 * 513 / 2) / 990e12
    assert outcome.ttft == pytest.approx(max(products, weights / 3.35e12) + attention, rel=1e-3)
    decode = [(weights + kv * (513 + i) + 2 * 4096) / 3.35e12 for i in range(2)]
    assert outcome.e2e - outcome.ttft == pytest.approx(sum(decode), rel=1e-3)
    assert report["iterations"] == 3 and report["output_tokens"] == 3


@pytest.mark.parametrize(
    ("rate", "settings"),
    [
        (2, {}),
        (30, {}),
        (60, {"kv_cache_memory_bytes": 720_000_000, "max_model_len": 4096}),
        (20, {"mesh": "tp=1,dp=2"}),
    ],
    ids=["idle", "full", "few pages", "replicas"],
)
def test_skipping_ahead_changes_nothing(monkeypatch, rate, settings):
    seen = []
    for most in (512, 1):
        monkeypatch.setattr(steering, "MOST_STEPS", most)
        paper = engine(**settings)
        results, report = run([paper], at_rate(random_arrivals(60, 300, 150, spread=0.7), rate))
        times = [(o.first, o.last, o.longest) for o in results.outcomes]
        steps = report["iterations"], report["preemptions"], report["itl_ms"]["p99"]
        seen.append((np.array(times), steps, paper.engine.num_completed))
    (times, steps, plans), (other_times, other_steps, other_plans) = seen
    np.testing.assert_allclose(times, other_times, rtol=1e-6)
    assert steps == pytest.approx(other_steps, rel=1e-6) and plans < 0.8 * other_plans
    assert steps[1] > 0 or "kv_cache_memory_bytes" not in settings


def test_replicas_and_prefixes_go_where_the_prefix_is():
    engines = [engine(max_num_batched_tokens=4096) for _ in range(2)]
    arrivals = [Arrival(float(i // 2), 2048, 2, blocks=(i % 2, 10 + i % 2, 20 + i, 30 + i), number=i) for i in range(8)]
    results, report = run(engines, arrivals)
    assert [o.num_cached for o in results.outcomes] == [0, 0] + [1024] * 6
    assert report["prefix_hit_tokens"] == 6 * 1024 and report["num_devices"] == 2
    assert [o.clock is engines[0].clock for o in results.outcomes] == 4 * [True, False]


def test_a_static_batch_waits_for_its_longest_and_answers_together():
    arrivals = [Arrival(0.0, 100, 10, number=0), Arrival(0.0, 100, 200, number=1), Arrival(0.1, 100, 10, number=2)]
    results, _ = run([engine(policy="static", max_num_batched_tokens=9000)], arrivals)
    first, second, third = results.outcomes
    assert first.finished == second.finished < third.first
    results, _ = run([engine()], arrivals)
    first, second, third = results.outcomes
    assert first.finished < second.finished and third.finished < second.finished


def test_prefill_first_stalls_decodes_that_chunks_do_not():
    arrivals = [Arrival(0.0, 64, 400, number=0), *(Arrival(0.5 + i / 50, 7000, 2, number=1 + i) for i in range(5))]
    longest = {}
    for policy, budget in (("chunked", 512), ("prefill-first", 9000), ("unchunked", 9000)):
        results, _ = run([engine(policy=policy, max_num_batched_tokens=budget)], arrivals)
        longest[policy] = results.outcomes[0].longest
    assert longest["prefill-first"] > 0.3 > 0.2 > longest["unchunked"] > 5 * longest["chunked"]


def test_contiguous_room_admits_fewer():
    arrivals = list(random_arrivals(40, 256, 64))
    peak = {}
    for policy in ("chunked", "contiguous"):
        paper = engine(policy=policy, max_num_seqs=64, kv_cache_memory_bytes=4 * 8192 * 131072 + (1 << 22))
        results, _ = run([paper], arrivals)
        spans = [(o.first, o.finished) for o in results.outcomes]
        peak[policy] = max(sum(a <= t < b for a, b in spans) for t, _ in spans)
    assert peak["contiguous"] == 4 and peak["chunked"] > 16


def test_decode_loops_deliver_bursts_where_nobody_streams():
    arrivals = [Arrival(0.0, 64, 33)]
    burst, _ = run([engine()], arrivals, streamed=False)
    single, _ = run([engine()], arrivals)
    assert burst.gaps.num_zero == 28 and len(burst.gaps.single) == 4
    assert burst.outcomes[0].num_tokens == single.outcomes[0].num_tokens == 33


def test_more_bytes_take_longer_and_fewer_devices_do_not_hold_the_model():
    def itl(**settings):
        return run([engine(**settings)], [Arrival(0.0, 4096, 50)])[1]["itl_ms"]["p50"]

    assert itl(kv_dtype="int8") < itl() < itl(kv_dtype="float32")
    with pytest.raises(ValueError, match=r"takes 141.* GB of weights and 1 x NVIDIA H100"):
        paper_engine(EngineConfig(model="llama-3.1-70b"), preset("llama-3.1-70b"), PERFECT)
    with pytest.raises(ValueError, match="axis 'ep' is not simulated"):
        engine(mesh="ep=2")
    with pytest.raises(ValueError, match="do not divide by mesh axis tp=3"):
        engine(mesh="tp=3")


def test_percentiles_of_weighted_values_are_those_of_the_values_repeated():
    random = np.random.default_rng(0)
    values, weights = random.random(200), random.integers(1, 9, 200)
    found = weighted_percentiles(values, weights)
    repeated = np.repeat(values, weights)
    for p in (50, 90, 99):
        assert found[f"p{p}"] == pytest.approx(1e3 * np.percentile(repeated, p, method="inverted_cdf"))
    assert found["mean"] == pytest.approx(1e3 * repeated.mean())


def test_poisson_arrivals_have_their_rate_and_bursts_come_together():
    def times(**kwargs):
        return np.array([a.at for a in at_rate(random_arrivals(4000, 8, 8), 20.0, **kwargs)])

    for process in ("poisson", "gamma", "uniform", "bursts"):
        assert times(process=process)[-1] == pytest.approx(200, rel=0.1)
    gaps = np.diff(times(process="poisson"))
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    gaps = np.diff(times(process="gamma", burstiness=0.25))
    assert gaps.std() == pytest.approx(2 * gaps.mean(), rel=0.15)
    assert (np.diff(times(process="bursts", burst_size=8)) == 0).mean() == pytest.approx(7 / 8, abs=0.01)
    assert all(a.at == 0 for a in at_rate(random_arrivals(5, 8, 8), math.inf))


def test_an_arrival_is_a_value():
    arrival = Arrival(1.0, 700, 5, blocks=(3, 4), number=9)
    assert arrival.prompt == [3] * 512 + [4] * 188
    assert dataclasses.replace(arrival, blocks=(3,)).prompt == [3] * 512 + [-11] * 188


def test_the_queue_over_time_is_what_requests_waited():
    arrivals = [Arrival(float(i), 1000, 200, number=i) for i in range(5)]
    results, report = run([engine(max_num_seqs=1)], arrivals)
    ends = [outcome.finished for outcome in results.outcomes]
    waited = sum(max(0.0, before - outcome.at) for before, outcome in zip(ends, results.outcomes[1:], strict=False))
    assert waited > 1 and report["queue"]["mean"] * results.duration_s == pytest.approx(waited, rel=0.02)
    assert report["queue"]["max"] == max(sum(a.at < end for a in arrivals) - i - 1 for i, end in enumerate(ends))
    assert report["running"]["p50"] == report["running"]["max"] == 1


def test_a_level_has_each_value_for_as_long_as_it_had_it():
    level = Level()
    for time, change in ((4.0, -4), (1.0, 3), (1.0, 1), (2.0, 0)):
        level.change(time, change)
    values, seconds = level.weighted(0.0, 10.0)
    assert {v: sum(seconds[values == v]) for v in (0.0, 3.0, 4.0)} == {0.0: 7.0, 3.0: 0.0, 4.0: 3.0}
    assert level.weighted(2.0, 3.0)[1].sum() == 1.0
