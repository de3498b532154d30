"""Rotary position embeddings (Su et al. 2021), in the half-split layout of Hugging Face checkpoints.

Dimension letters: T tokens, H head width. Knows nothing of requests: a token's angle is its position's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Return float32 `[H/2]` angular frequencies in radians per position."""
    inv = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        inv = _llama3_scaled(inv, scaling)
    return inv.astype(np.float32)


def _llama3_scaled(inv: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths above original/low are stretched, below original/high kept, blended between."""
    turns = s.original_max_position * inv / (2 * math.pi)
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return inv * keep + inv / s.factor * (1.0 - keep)


def rope_tables(positions_T: jax.Array, inv_freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return (cos, sin), each float32 `[T, H/2]`."""
    angles = positions_T.astype(jnp.float32)[:, None] * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `x [T, ..., H]`: pairs are (i, i + H/2)."""
    extra = (1,) * (x.ndim - 2)
    cos, sin = (t.reshape(t.shape[0], *extra, t.shape[1]) for t in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
