"""The kernels of training on CPUs give what plain XLA gives, values and derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.attention.packed import packed_attention
from jaxllm.ops.cpu import ffi, row_product, span_attention, swiglu
from jaxllm.ops.mlp import activate
from jaxllm.ops.rope import apply_rope

if reason := ffi.unavailable(quantized=True):
    pytest.skip(reason, allow_module_level=True)


def numbers(seed: int, *shape: int, spread: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape, scale=spread), jnp.float32)


def compare(ours, wanted, x: jax.Array) -> None:
    """Values and the derivative of a random combination of them."""
    (a, back_a), (b, back_b) = jax.vjp(jax.jit(ours), x), jax.vjp(jax.jit(wanted), x)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    change = numbers(9, *a.shape)
    np.testing.assert_allclose(back_a(change)[0], back_b(change)[0], rtol=0, atol=2e-5)


def test_gated_activation_and_its_derivative():
    h = numbers(0, 33, 2, 48, spread=30.0).at[0, 0, 0].set(-1e4).at[0, 0, 1].set(1e4)
    change = numbers(1, 33, 48)
    (a, back_a), (b, back_b) = jax.vjp(swiglu.swiglu, h), jax.vjp(lambda h: activate(h, "silu"), h)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back_a(change)[0], back_b(change)[0], rtol=1e-5, atol=1e-4)
    assert not swiglu.takes(h[:, :, :40]) and not swiglu.takes(h[:, :1]) and not swiglu.takes(h.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("span", "heads", "group", "width", "documents"),
    [(32, 2, 1, 32, False), (64, 2, 3, 64, True), (48, 1, 2, 32, True)],
)
def test_attention_within_spans_and_its_derivative(span, heads, group, width, documents):
    qkv = numbers(2, 2 * span, heads, group + 2, width)
    angles = jnp.asarray(np.random.default_rng(3).uniform(0, 6, (2 * span, width // 2)), jnp.float32)
    rope, spec = (jnp.cos(angles), jnp.sin(angles)), AttentionSpec(scale=0.2)
    runs = np.sort(np.random.default_rng(4).integers(-1, 4, (2, span)), axis=1).ravel()
    owners = jnp.asarray(runs, jnp.int32) if documents else None

    def plain(qkv: jax.Array) -> jax.Array:
        turned = apply_rope(qkv[:, :, :-1], rope)
        keys_values = jnp.concatenate([turned[:, :, -1:], qkv[:, :, -1:]], axis=2)
        return packed_attention(turned[:, :, :-1], keys_values, owners, span=span, spec=spec)

    assert span_attention.takes(qkv, rope, spec, span)
    compare(lambda qkv: span_attention.span_attention(qkv, rope, owners, span=span, scale=0.2), plain, qkv)


def test_attention_says_what_it_is_not_written_for():
    qkv, rope = numbers(5, 32, 1, 3, 32), (numbers(6, 32, 16), numbers(7, 32, 16))
    for spec in (AttentionSpec(scale=1.0, window=4), AttentionSpec(scale=1.0, softcap=30.0)):
        assert not span_attention.takes(qkv, rope, spec, 32)
    plain = AttentionSpec(scale=1.0)
    assert span_attention.takes(qkv, rope, plain, 32)
    assert not span_attention.takes(qkv, rope, plain, 8)
    assert not span_attention.takes(qkv, (rope[0][:, :8], rope[1][:, :8]), plain, 32)


@pytest.mark.skipif(ffi.unavailable() is not None, reason="needs bfloat16 instructions")
@pytest.mark.parametrize(("t", "k", "n"), [(6, 16, 32), (34, 48, 96), (1536, 64, 128)])
def test_product_over_rows_equals_that_of_rounded_numbers(t, k, n):
    x, c = numbers(0, t, k).astype(jnp.bfloat16), numbers(1, t, n)
    want = np.asarray(x, np.float64).T @ np.asarray(c.astype(jnp.bfloat16), np.float64)
    assert row_product.takes(x, c)
    for side in (c, c.astype(jnp.bfloat16)):
        got = np.asarray(jax.jit(row_product.row_product)(x, side))
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not row_product.takes(x[1:], c[1:]) and not row_product.takes(x, c[:, :16])
