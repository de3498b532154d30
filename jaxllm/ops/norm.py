"""Normalisation. Dimension letters: T tokens, D model width."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x_TD: jax.Array, scale_D: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """Root-mean-square norm over `axes` (Zhang & Sennrich 2019), computed in float32."""
    x32 = x_TD.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)
    return (x32 * inverse * scale_D.astype(jnp.float32)).astype(x_TD.dtype)


def layer_norm(x_TD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """Mean and variance norm over the last dim (Ba et al. 2016), computed in float32."""
    x32 = x_TD.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * inverse * scale_D + bias_D).astype(x_TD.dtype)
