"""Normalisation. Dimension letters: T tokens, D model width.

Each is jitted on its own: a program traces it once, not once per layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

_MOST_TERMS = 64  # that are added one after the other


@functools.partial(jax.jit, static_argnames=("eps", "axes"))
def rms_norm(x_TD: jax.Array, scale_D: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """Root-mean-square norm over `axes` (Zhang & Sennrich 2019), computed in float32."""
    return cast("jax.Array", _differentiable(x_TD, scale_D, eps, axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _differentiable(x_TD: jax.Array, scale_D: jax.Array, eps: float, axes: int | tuple[int, ...]) -> jax.Array:
    return _rms(x_TD, scale_D, eps, axes)


def _rms(x_TD: jax.Array, scale_D: jax.Array, eps: float, axes: int | tuple[int, ...]) -> jax.Array:
    x32 = x_TD.astype(jnp.float32)
    inverse = jax.lax.rsqrt(_mean(x32 * x32, axes) + eps)
    return (x32 * inverse * scale_D.astype(jnp.float32)).astype(x_TD.dtype)


def _forward(x_TD: jax.Array, scale_D: jax.Array, eps: float, axes: int | tuple[int, ...]):
    return _rms(x_TD, scale_D, eps, axes), (x_TD, scale_D)


def _backward(eps: float, axes: int | tuple[int, ...], kept: tuple[jax.Array, jax.Array], change_TD: jax.Array):
    """With `n = x / rms`: `dx = (s dy - n mean(s dy n)) / rms` and `ds = sum dy n`.

    Over plain rows these sums are products with ones: XLA's CPU backend adds up rows and columns one element at a time.
    """
    x_TD, scale_D = kept
    if x_TD.ndim != 2 or axes != -1:
        return jax.vjp(lambda x, scale: _rms(x, scale, eps, axes), x_TD, scale_D)[1](change_TD)
    x32, change, width = x_TD.astype(jnp.float32), change_TD.astype(jnp.float32), x_TD.shape[1]
    mean: Callable[[jax.Array], jax.Array] = lambda a: jnp.matmul(
        a, jnp.full((width, 1), 1 / width), precision="highest"
    )
    inverse = jax.lax.rsqrt(mean(x32 * x32) + eps)
    normed, scaled = x32 * inverse, change * scale_D.astype(jnp.float32)
    change_x = inverse * (scaled - normed * mean(scaled * normed))
    change_scale = jnp.matmul(jnp.ones((1, x_TD.shape[0])), change * normed, precision="highest")[0]
    return change_x.astype(x_TD.dtype), change_scale.astype(scale_D.dtype)


_differentiable.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames=("eps",))
def layer_norm(x_TD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, eps: float) -> jax.Array:
    """Mean and variance norm over the last dim (Ba et al. 2016), computed in float32."""
    x32 = x_TD.astype(jnp.float32)
    centred = x32 - _mean(x32, -1)
    inverse = jax.lax.rsqrt(_mean(centred * centred, -1) + eps)
    normed = centred * inverse * scale_D
    return (normed if bias_D is None else normed + bias_D).astype(x_TD.dtype)


def _mean(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The mean, with the reduced dims kept.

    XLA's CPU backend sums a row in an order that depends on the number of rows; there the order is spelled out.
    """
    if axes != -1:
        return jnp.mean(x, axis=axes, keepdims=True)
    return jax.lax.platform_dependent(x, cpu=_mean_by_halves, default=lambda x: jnp.mean(x, axis=-1, keepdims=True))


def _mean_by_halves(x: jax.Array) -> jax.Array:
    width = left = x.shape[-1]
    while left % 2 == 0:
        left //= 2
        x = x[..., :left] + x[..., left:]
    if left > _MOST_TERMS:
        return jnp.sum(x, axis=-1, keepdims=True) / width
    total = x[..., :1]
    for i in range(1, left):
        total = total + x[..., i : i + 1]
    return total / width
