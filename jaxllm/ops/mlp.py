"""Activations of the feed-forward network. Dimension letters: T tokens, F feed-forward width."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.config import ClampedSwiglu

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@functools.partial(jax.jit, static_argnames=("name", "clamped"))  # a program traces it once, not once per layer
def activate(h_TXF: jax.Array, name: str, clamped: ClampedSwiglu | None = None) -> jax.Array:
    """`[T, 2, F]` (gate, up) or `[T, 1, F]` -> `[T, F]`."""
    if clamped is not None:
        return _clamped_swiglu(h_TXF[:, 0], h_TXF[:, 1], clamped)
    h_TF = _ACTIVATIONS[name](h_TXF[:, 0])
    return h_TF if h_TXF.shape[1] == 1 else h_TF * h_TXF[:, 1]


def _clamped_swiglu(gate_TF: jax.Array, up_TF: jax.Array, c: ClampedSwiglu) -> jax.Array:
    gate_TF = jnp.minimum(gate_TF, c.limit)
    return (jnp.clip(up_TF, -c.limit, c.limit) + 1) * gate_TF * jax.nn.sigmoid(c.alpha * gate_TF)
