"""Speculation on paper: tokens as the acceptance rate says, at the cost of verifying, and only where that pays."""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.simulation.arrivals import Arrival, at_rate, random_arrivals
from jaxllm.simulation.paper_drafts import PaperDrafts
from tests.simulation.test_fleet import H100, PERFECT, engine, run

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def drafting(acceptance: float, hardware=H100, **settings):
    return engine(dataclasses.replace(hardware, acceptance=acceptance), speculative_config=NGRAM, **settings)


def test_drafts_that_are_all_right_bring_as_many_tokens_more():
    (plain,) = run([engine()], [Arrival(0.0, 100, 101)])[0].outcomes
    results, report = run([drafting(1.0)], [Arrival(0.0, 100, 101)])
    (outcome,) = results.outcomes
    assert outcome.num_tokens == 101 and report["acceptance_rate"] == 1.0 and report["mean_acceptance_length"] == 5
    assert report["iterations"] == 1 + 100 / 5
    assert outcome.tpot == pytest.approx(plain.tpot / 5, rel=0.1) and outcome.ttft == pytest.approx(plain.ttft)


@pytest.mark.parametrize("streamed", [True, False])
def test_every_answer_has_its_length_and_rows_the_tokens_of_the_acceptance_rate(streamed):
    arrivals = list(at_rate(random_arrivals(60, 200, 150, spread=0.7), 30.0))
    results, report = run([drafting(0.6)], arrivals, streamed=streamed)
    assert [o.num_tokens for o in results.outcomes] == [a.output_len for a in arrivals]
    assert report["mean_acceptance_length"] == pytest.approx((1 - 0.6**5) / 0.4, rel=0.05)
    plain, _ = run([engine()], arrivals, streamed=streamed)
    assert results.duration_s < plain.duration_s


def test_no_more_is_verified_than_pays():
    drafts = PaperDrafts(0.5)
    assert drafts.expected(4) == pytest.approx((1 - 0.5**5) / 0.5)
    assert drafts.worth(4, lambda count: 1.0) == 4 and drafts.worth(4, lambda count: 1.0 + count) == 0
    arrivals = list(random_arrivals(600, 16, 30))  # at once: by then products are bound by arithmetic
    report = run([drafting(0.3, PERFECT, max_num_seqs=600, max_num_batched_tokens=2048)], arrivals)[1]
    assert report["mean_acceptance_length"] < 1 + 0.3 + 0.3**2


def test_a_draft_is_right_only_where_all_before_it_are():
    assert PaperDrafts(1.0).accepted([3, 0, 1]) == [3, 0, 1] and PaperDrafts(1.0).accepted([]) == []
    found = PaperDrafts(0.5).accepted([4] * 4000)
    assert sum(found) / 4000 == pytest.approx(0.5 + 0.25 + 0.125 + 0.0625, rel=0.05)
