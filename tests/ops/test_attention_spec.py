"""Windows, soft-caps, sinks: against a dense reference, for every mix of rows; work outside a window is skipped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import AttentionSpec, RaggedRows, ragged_paged_attention
from jaxllm.ops.attention.xla import single_query_attention
from tests.helpers.count_products import count_products

K, G, H, C, M = 2, 3, 8, 4, 32


def cache(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    pages = rng.normal(size=(1 + num_rows * M, 2, C, K, H)).astype(np.float32)
    return pages, 1 + rng.permutation(num_rows * M).reshape(num_rows, M).astype(np.int32)


def dense(q_KGH: np.ndarray, keys: np.ndarray, values: np.ndarray, spec: AttentionSpec, sinks: Any) -> np.ndarray:
    scores = np.einsum("KGH,SKH->KGS", q_KGH, keys) * spec.scale
    if spec.softcap:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    if spec.window:
        scores[..., : max(0, scores.shape[-1] - spec.window)] = -np.inf
    weights = np.exp(scores)
    total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks))
    return np.einsum("KGS,SKH->KGH", weights / total[..., None], values)


@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_ragged_rows_equal_a_dense_reference(window, softcap, with_sinks) -> None:
    rng = np.random.default_rng(1)
    spec = AttentionSpec(scale=0.4, window=window, softcap=softcap)
    q_len, kv_len = np.array([1, 1, 13, 7]), np.array([90, 3, 64, 7])  # two decodes, a chunk, a whole prompt
    pages, table = cache(rng, 4)
    q = rng.normal(size=(32, K, G, H)).astype(np.float32)
    sinks = rng.normal(size=(K, G)).astype(np.float32) if with_sinks else None
    starts = np.cumsum(q_len) - q_len
    rows = RaggedRows(*map(jnp.array, (starts, q_len, kv_len, 2, table)))
    attend = jax.jit(ragged_paged_attention, static_argnames=("spec", "query_tile", "key_block"))
    got = attend(q, pages, rows, spec=spec, sinks_KG=sinks, query_tile=4, key_block=8)
    for row in range(4):
        keys, values = (pages[table[row], half].reshape(-1, K, H) for half in (0, 1))
        for i in range(q_len[row]):
            sees = kv_len[row] - q_len[row] + i + 1
            expected = dense(q[starts[row] + i], keys[:sees], values[:sees], spec, sinks)
            np.testing.assert_allclose(got[starts[row] + i], expected, atol=2e-5)


def test_a_decode_far_beyond_its_window_costs_what_the_window_costs(monkeypatch) -> None:
    pages = jnp.ones((129, 2, 16, K, 64))
    table = jnp.arange(1, 129).reshape(1, -1)
    q = jnp.ones((1, K, G, 64))

    def products(window: int | None, length: int) -> int:
        def attend(n):
            return single_query_attention(q, pages, n, table, spec=AttentionSpec(scale=1, window=window))

        return count_products(monkeypatch, attend, jnp.array([length]))

    assert products(32, 2048) <= products(None, 2048) / 8
    assert products(32, 2048) == products(32, 1024) > 0
