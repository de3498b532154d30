"""Pages below the device on paper: the engine's own tiers, at the speed of modelled links."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxllm.simulation.arrivals import Arrival
from tests.simulation.test_fleet import PERFECT, engine, run

LINK, DISK = 20e9, 2e9
HARDWARE = dataclasses.replace(PERFECT, host_link=LINK, disk_rate=DISK)
ROW = 2 * 2 * 8 * 128 * 32  # bytes of one token in the cache
SIZES: dict[str, Any] = {"kv_cache_memory_bytes": 4600 * ROW, "max_model_len": 4096, "max_num_batched_tokens": 4096}


def again(**settings) -> tuple[list, dict]:
    """One prompt, another that pushes it off the device, and the first again."""
    blocks = (tuple(range(8)), tuple(range(10, 18)), tuple(range(8)))
    arrivals = [Arrival(10.0 * i, 4000, 2, blocks=b, number=i) for i, b in enumerate(blocks)]
    results, report = run([engine(HARDWARE, **SIZES, **settings)], arrivals)
    return results.outcomes, report


def test_a_prefix_comes_back_from_the_host_as_fast_as_its_bytes():
    (first, _, third), report = again(host_kv_bytes=8192 * ROW)
    assert third.num_cached > 3500 and report["tier_hit_rates"]["host"] > 0.25
    loaded = report["tier_moves"]["pages_in"] * 16 * ROW / LINK
    assert loaded == pytest.approx(report["tier_moves"]["seconds_in"], rel=1e-6)
    assert loaded < third.ttft < loaded + 0.5 * first.ttft
    (first, _, third), report = again()
    assert third.num_cached < 1000 and third.ttft > 0.8 * first.ttft and "tier_hit_rates" not in report


def test_what_the_host_has_no_room_for_comes_from_the_disk_and_takes_longer():
    (_, _, from_host), _ = again(host_kv_bytes=8192 * ROW)
    (_, _, from_disk), report = again(host_kv_bytes=160 * ROW, disk_kv_bytes=16384 * ROW, disk_kv_path="on paper")
    assert report["tier_hit_rates"]["disk"] > 0.25 > 0.02 > report["tier_hit_rates"]["host"]
    pages = report["tier_moves"]["pages_in"]
    assert from_disk.ttft - from_host.ttft == pytest.approx(pages * 16 * ROW / DISK, rel=0.1)


def test_swapped_requests_go_on_where_they_were():
    arrivals = [Arrival(0.0, 1500, 900, number=i) for i in range(3)]
    for mode in ("swap", "recompute"):
        paper = engine(HARDWARE, **SIZES, host_kv_bytes=8192 * ROW, preemption_mode=mode)
        results, report = run([paper], arrivals)
        assert all(outcome.num_tokens == 900 for outcome in results.outcomes) and report["preemptions"] > 0
        assert (report["tier_moves"]["swaps_in"] > 0) == (mode == "swap")


def test_a_host_smaller_than_a_page_and_swaps_without_one_are_refused():
    with pytest.raises(ValueError, match="host_kv_bytes=5 is less than one page; use at least 2097152"):
        engine(host_kv_bytes=5)
    with pytest.raises(ValueError, match="preemption_mode='swap' needs room in host memory"):
        engine(preemption_mode="swap")
