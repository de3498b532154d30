"""Routing and grouped products: no row is lost, and the work follows the rows, not the experts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import RoutedExperts
from jaxllm.ops import moe
from jaxllm.ops.moe import grouped_matmul, route, sort_by_expert
from tests.helpers.count_products import count_products


@pytest.mark.parametrize("sizes", [(5, 0, 20, 3), (0, 0, 0, 0), (28, 0, 0, 0), (1, 1, 1, 25)])
def test_every_row_meets_its_own_matrix_and_the_rest_are_zeros(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(30, 6)).astype(np.float32), rng.normal(size=(4, 6, 10)).astype(np.float32)
    expected, start = np.zeros((30, 10)), 0
    for expert, size in enumerate(sizes):
        expected[start : start + size] = x[start : start + size] @ w[expert]
        start += size
    np.testing.assert_allclose(grouped_matmul(jnp.array(x), jnp.array(w), jnp.array(sizes)), expected, atol=1e-5)


def test_sorting_puts_other_devices_rows_last() -> None:
    experts = jnp.array([[5, 2], [3, 7], [2, 3]])
    order, place, sizes = sort_by_expert(experts, jnp.int32(2), 2)
    assert experts.ravel()[order].tolist() == [2, 2, 3, 3, 5, 7]
    assert sizes.tolist() == [2, 2]
    assert order[place].tolist() == list(range(6))


def test_grouped_choice_stays_in_the_best_groups() -> None:
    cfg = RoutedExperts(
        num_experts=6, per_token=2, ffn_size=1, score="sigmoid", num_groups=3, groups_per_token=1, group_score="top2"
    )
    # The best single expert is in group 0, the best pair in group 2.
    experts, _ = route(jnp.array([[3.0, -9.0, 0.0, 0.0, 2.0, 2.5]]), cfg, jnp.zeros(6))
    assert sorted(experts[0].tolist()) == [4, 5]


def test_the_correction_chooses_but_does_not_weigh() -> None:
    cfg = RoutedExperts(num_experts=3, per_token=1, ffn_size=1, score="sigmoid", correction_bias=True)
    experts, weights = route(jnp.array([[1.0, 0.0, 0.0]]), cfg, jnp.array([0.0, 0.0, 5.0]))
    assert experts.tolist() == [[2]]
    assert weights[0, 0] == pytest.approx(0.5)


def test_the_cost_follows_the_routed_rows_not_the_experts(monkeypatch) -> None:
    """64 times the experts for the same rows: a product of experts x rows would take 64 times as much."""

    def products(num_experts: int) -> int:
        x, w = jnp.ones((512, 16)), jnp.ones((num_experts, 16, 16))
        sizes = jnp.full(num_experts, 512 // num_experts)
        return count_products(monkeypatch, moe._blocked_matmul, x, w, sizes)

    assert products(1) == 512 * 16 * 16
    assert products(64) <= 2 * products(1)
