"""Multi-head latent attention: a small cache, and absorbed products that equal the expanded ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxllm.families.presets import preset
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.attention.xla import single_query_attention

T, N, R, NOPE, ROPE, VALUE, C = 37, 4, 24, 16, 8, 12, 4  # tokens, heads, ranks and widths, page size


def test_the_cache_holds_rank_plus_rope_elements_per_token_and_layer(tiny_model, load) -> None:
    runner = load(tiny_model("deepseek_v3").folder).engine.runner
    slots = runner.shapes.num_pages * runner.shapes.page_size
    assert [pages.size // slots for pages in runner.state.pages] == [24 + 8] * 3


def test_a_deepseek_v3_token_takes_70_kilobytes_in_bfloat16() -> None:
    assert preset("deepseek-v3").kv_bytes_per_token(2) == 61 * (512 + 64) * 2 == 70272


def test_absorbed_attention_equals_expanded_attention() -> None:
    rng = np.random.default_rng(0)
    latent, rope = rng.normal(size=(T, R)), rng.normal(size=(T, ROPE))
    up = rng.normal(size=(R, N, NOPE + VALUE))
    q_nope, q_rope = rng.normal(size=(N, NOPE)), rng.normal(size=(N, ROPE))

    keys, values = np.einsum("TR,RNH->TNH", latent, up[..., :NOPE]), np.einsum("TR,RNH->TNH", latent, up[..., NOPE:])
    scores = 0.1 * (np.einsum("NH,TNH->NT", q_nope, keys) + np.einsum("NH,TH->NT", q_rope, rope))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expanded = np.einsum("NT,TNH->NH", weights / weights.sum(axis=1, keepdims=True), values)

    num_pages = -(-T // C)
    pages = np.zeros((num_pages + 1, 1, C, 1, R + ROPE), np.float32)
    pages[1:].reshape(-1, R + ROPE)[:T] = np.concatenate([latent, rope], axis=1)
    query = np.concatenate([np.einsum("NH,RNH->NR", q_nope, up[..., :NOPE]), q_rope], axis=1)
    out = single_query_attention(
        jnp.asarray(query, jnp.float32)[None, None],
        jnp.asarray(pages),
        jnp.array([T]),
        jnp.arange(1, num_pages + 1)[None],
        spec=AttentionSpec(scale=0.1, value_width=R),
    )
    np.testing.assert_allclose(np.einsum("NR,RNH->NH", out[0, 0], up[..., NOPE:]), expanded, atol=1e-4)
