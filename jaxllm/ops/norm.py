"""Normalisation. Dimension letters: T tokens, D model width."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x_TD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019), computed in float32."""
    x32 = x_TD.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale_D.astype(jnp.float32)).astype(x_TD.dtype)
