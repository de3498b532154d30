"""What drafts are said to have brought, and what verifying them is said to cost."""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.families.presets import model_config
from jaxllm.roofline.cost_model import model_cost
from jaxllm.runner import speculation
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.telemetry.drafts import DraftPauses, DraftPrice, DraftTotals, LoopDrafts, verifying_ratio

MODEL = model_cost(model_config("llama-2-7b"))


def test_totals_count_requests_tokens_and_positions() -> None:
    totals = DraftTotals(accepted_at=[0, 0, 0])
    totals.add([3, 0, 3, 2], [2, 0, 0, 2])
    assert (totals.num_drafts, totals.num_draft_tokens, totals.num_accepted_tokens) == (3, 8, 4)
    assert totals.accepted_at == [2, 2, 0]
    assert totals.acceptance_rate == 0.5 and totals.mean_acceptance_length == pytest.approx(1 + 4 / 3)


def test_verifying_costs_little_while_weights_are_read_and_much_where_the_batch_fills_the_device() -> None:
    ratios = [verifying_ratio(MODEL, rows, 4, ridge=300) for rows in (1, 8, 64, 512)]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1.05 and ratios[-1] > 3.5
    assert max(ratios) < 5, "five times the arithmetic and no more memory"


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_the_price_learns_from_times_and_stays_near_the_model(share: float) -> None:
    price, rng = DraftPrice(MODEL, 4, ridge=None), random.Random(0)
    model = price(1)
    for _ in range(200):
        plain, verifying = rng.randrange(5), rng.randrange(5)
        price.observe(1, plain, verifying, (plain * 1.0 + verifying * (1 + share * model)) * rng.uniform(0.98, 1.02))
    assert price(1) == pytest.approx(share * model, rel=0.15)
    for _ in range(200):
        price.observe(1, 1, 0, 1.0)
        price.observe(1, 0, 1, 100.0)
    assert price(1) == pytest.approx(2 * model), "no disturbance makes it absurd"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_expected_tokens_are_those_of_the_formula(rate: float) -> None:
    drafts = 4
    sure = jnp.array([0, 2])  # of the second row a grammar says the first two
    expected, with_sure = speculation._expected(jnp.array([rate, rate]), sure, jnp.array([drafts, drafts]), drafts)
    assert 1 + float(expected) == pytest.approx((1 - rate ** (drafts + 1)) / (1 - rate), rel=1e-5)
    draws = np.random.default_rng(0).random((20000, drafts)) < rate
    assert 1 + float(expected) == pytest.approx(1 + np.cumprod(draws, axis=1).sum(axis=1).mean(), rel=0.03)
    share = speculation._SURE
    assert float(with_sure) == pytest.approx(share + share**2 * (1 + rate + rate**2), rel=1e-5)


def test_drafts_that_are_never_worth_it_are_left_out_ever_longer_until_somebody_comes() -> None:
    pauses, loop = DraftPauses(), IterationPlan([], is_decode_loop=True, num_steps=8)
    nothing, something = LoopDrafts([], 1, 8, 0), LoopDrafts([], 1, 8, 1)

    def plain_loops() -> int:
        pauses.observe(nothing)
        count = 0
        while pauses.begin(loop):
            count += 1
        return count

    assert not pauses.begin(loop)
    assert [plain_loops() for _ in range(5)] == [1, 2, 4, 8, 16]
    pauses.observe(something)
    assert plain_loops() == 1
    pauses.observe(nothing)
    newcomer = IterationPlan([], [object()])  # type: ignore[list-item]
    assert not pauses.begin(newcomer) and not pauses.begin(loop)
    assert plain_loops() == 1


def test_drafts_that_cost_nothing_are_never_left_out() -> None:
    pauses, loop = DraftPauses(looking_costs=False), IterationPlan([], is_decode_loop=True, num_steps=8)
    for _ in range(20):
        pauses.observe(LoopDrafts([], 1, 8, 0))
        assert not pauses.begin(loop)
