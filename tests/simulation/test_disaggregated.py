"""Pools on paper: decodes are free of prompts, and transfers take the time that bytes over a link take."""

from __future__ import annotations

import pytest

from jaxllm.roofline.chips import CHIPS
from jaxllm.simulation.arrivals import Arrival, at_rate, random_arrivals
from jaxllm.simulation.disaggregated import Disaggregated, Link, link_bandwidth
from jaxllm.simulation.fleet import simulate
from jaxllm.simulation.policies import hand_over
from tests.simulation.test_fleet import engine, run


def pools(num_prefill: int = 1, num_decode: int = 1, gigabytes: float = 50.0, **settings) -> Disaggregated:
    prefill = [engine(**settings) for _ in range(num_prefill)]
    decode = [engine(policy=hand_over, **settings) for _ in range(num_decode)]
    return Disaggregated(prefill, decode, bytes_per_s=gigabytes * 1e9)


def test_decodes_never_wait_for_a_prompt():
    arrivals = list(at_rate(random_arrivals(60, 3000, 100, spread=0.3), 8.0))
    apart, (colocated, _) = simulate(pools(), arrivals), run([engine()], arrivals)
    assert all(
        outcome.num_tokens == arrival.output_len for outcome, arrival in zip(apart.outcomes, arrivals, strict=True)
    )
    typical = sorted(outcome.tpot for outcome in apart.outcomes)
    assert typical[-1] < 1.3 * typical[0]
    assert max(o.tpot for o in colocated.outcomes) > 1.3 * typical[-1]
    assert max(o.longest for o in colocated.outcomes) > 1.5 * min(o.longest for o in apart.outcomes)


def test_a_slower_link_shows_in_the_gap_after_the_first_token():
    def second(gigabytes: float) -> float:
        (outcome,) = simulate(pools(gigabytes=gigabytes, max_num_batched_tokens=4096), [Arrival(0.0, 4000, 3)]).outcomes
        return outcome.longest

    row = 2 * 2 * 8 * 128 * 32  # bytes of one token
    assert second(0.1) - second(1.0) == pytest.approx(4000 * row * (1 / 0.1e9 - 1 / 1e9), rel=0.02)


def test_pages_stream_while_the_prompt_is_computed():
    link = Link(bytes_per_s=100.0)
    assert link.send(1000, since=0.0, until=20.0, last_bytes=100) == 21.0  # nine tenths were gone by then
    assert link.send(1000, since=20.0, until=20.0, last_bytes=1000) == 30.0
    assert link.send(1000, since=20.0, until=22.0, last_bytes=100) == 40.0  # behind the one before
    assert link.exposed_s == 1 + 10 + 18


def test_what_the_receiver_has_does_not_travel_and_prompts_go_where_they_are_soonest():
    arrivals = [Arrival(float(i), 2048, 20, blocks=(1, 2, 3, 10 + i), number=i) for i in range(4)]
    fleet = pools(num_prefill=2, max_num_batched_tokens=4096)
    results = simulate(fleet, arrivals)
    row = 2 * 2 * 8 * 128 * 32
    assert sum(link.num_bytes for link in fleet.links) == row * (2048 + 3 * 512)
    assert [o.num_cached for o in results.outcomes] == [0, 1536, 1536, 1536]


def test_a_full_decode_pool_holds_requests_back():
    arrivals = list(random_arrivals(30, 500, 50))
    results = simulate(pools(max_num_seqs=4), arrivals)
    spans = [(o.first, o.finished) for o in results.outcomes]
    assert all(o.num_tokens == 50 for o in results.outcomes)
    assert sorted(o.longest for o in results.outcomes)[-1] > 5 * spans[0][1] / 50


def test_links_are_named_or_measured():
    h100, v5e = CHIPS["h100"], CHIPS["v5e"]
    assert (link_bandwidth("nvlink", h100), link_bandwidth("ici", v5e), link_bandwidth("12.5", v5e)) == (
        450e9,
        45e9,
        12.5e9,
    )
    with pytest.raises(ValueError, match="transfer='token-ring'; use pcie4"):
        link_bandwidth("token-ring", h100)
