"""Rotary position embeddings (Su et al. 2021), in the half-split layout of Hugging Face checkpoints.

Dimension letters: T tokens, H head width. Knows nothing of requests: a token's angle is its position's.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import DynamicScaling, LinearScaling, LongRopeScaling, Rope, RopeScaling, YarnScaling

Tables = tuple[jax.Array, jax.Array]


def inverse_frequencies(rope: Rope, longest: int) -> np.ndarray:
    """Return float32 `[dim/2]` angular frequencies in radians per position.

    Scalings that depend on a sequence's length take `longest`, the longest sequence that can come: one set of
    frequencies for all, because keys in the cache stay as they were turned while their sequence grows.
    """
    theta = rope.theta
    if isinstance(rope.scaling, DynamicScaling):
        theta = _dynamic_theta(rope, rope.scaling, longest)
    inv = 1.0 / theta ** (np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    match rope.scaling:
        case LongRopeScaling(short_factors=short, long_factors=long, original_max_position=original):
            inv = inv / np.array(long if longest > original else short)
        case RopeScaling():
            inv = _llama3_scaled(inv, rope.scaling)
        case LinearScaling():
            inv = inv / rope.scaling.factor
        case YarnScaling():
            inv = _yarn_scaled(inv, rope.theta, rope.scaling)
    return inv.astype(np.float32)


def _dynamic_theta(rope: Rope, s: DynamicScaling, longest: int) -> float:
    """NTK-aware base for sequences of `longest` tokens; the model's own up to the length it was trained on."""
    stretch = s.factor * max(longest, s.original_max_position) / s.original_max_position - (s.factor - 1)
    return rope.theta * stretch ** (rope.dim / (rope.dim - 2))


def _llama3_scaled(inv: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Llama 3.1: wavelengths above original/low are stretched, below original/high kept, blended between."""
    turns = s.original_max_position * inv / (2 * math.pi)
    keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return inv * keep + inv / s.factor * (1.0 - keep)


def _yarn_scaled(inv: np.ndarray, theta: float, s: YarnScaling) -> np.ndarray:
    """YaRN: the blend runs over the dims between those that turn `beta_fast` and `beta_slow` times."""

    def dim_of(turns: float) -> float:
        return inv.size * math.log(s.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * inv.size - 1)
    stretch = np.clip((np.arange(inv.size) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return inv * (1.0 - stretch) + inv / s.factor * stretch


def rope_tables(positions_T: jax.Array, rope: Rope, longest: int) -> Tables:
    """Return (cos, sin), each float32 `[T, dim/2]`. `longest`: see `inverse_frequencies`."""
    angles = positions_T.astype(jnp.float32)[:, None] * inverse_frequencies(rope, longest)
    factor = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling | LongRopeScaling) else 1.0
    # XLA's CPU backend fuses sines into whatever uses them: again in every layer, and there once per head. A product it
    # keeps; this one changes no bit.
    scaled_identity = factor * np.eye(angles.shape[1], dtype=np.float32)
    return _keep(jnp.cos(angles), scaled_identity), _keep(jnp.sin(angles), scaled_identity)


def _keep(x: jax.Array, matrix: np.ndarray) -> jax.Array:
    return jnp.matmul(x, matrix, precision="highest")


@functools.partial(jax.jit, static_argnames=("interleaved",))  # a program traces it once, not once per layer
def apply_rope(x: jax.Array, tables: Tables, *, interleaved: bool = False) -> jax.Array:
    """Rotate the first `dim` of the last dim of `x [T, ..., H]`; the rest passes through.

    Pairs are (i, i + dim/2), or (2i, 2i + 1) when `interleaved`; the result is laid out as halves either way,
    which no product of two vectors rotated alike can tell.
    """
    extra = (1,) * (x.ndim - 2)
    cos, sin = (t.reshape(t.shape[0], *extra, t.shape[1]) for t in tables)
    dim = 2 * cos.shape[-1]
    turning = x[..., :dim].astype(jnp.float32)
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)
