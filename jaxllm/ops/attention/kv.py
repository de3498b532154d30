"""One layer's cached keys and values: a plain array of pages, or 8-bit numbers and their scales.

Quantise and dequantise, nothing else: where rows lie in the pages is `jaxllm.kv`'s business. Each key and each value
(one token, one head) has a scale of its own, so writing a token never touches another's:

    scale = max|x| / largest,  stored = round(x / scale),  x ~ stored * scale

with `largest` 127 for int8 and 448 for float8_e4m3fn. Scales are bfloat16, and numbers are divided by the rounded
scale, so its rounding costs nothing.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

SCALE_DTYPE = jnp.dtype(jnp.bfloat16)
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """Pages of 8-bit keys and values; both leaves are page-major, so pages move by `jax.tree.map`.

    Attributes:
        values: int8 or float8_e4m3fn `[P, 2, C, K, H]` (latent rows: `[P, 1, C, 1, W]`).
        scales: bfloat16, the same without the last dim.
    """

    values: jax.Array
    scales: jax.Array


Pages = jax.Array | QuantizedPages


def split_pages(pages: Any) -> tuple[jax.Array, jax.Array | None]:
    """Values and scales; an unquantised cache has no scales."""
    return (pages.values, pages.scales) if isinstance(pages, QuantizedPages) else (pages, None)


def is_quantized(dtype: jnp.dtype) -> bool:
    """Whether a cache of this dtype has scales."""
    return jnp.dtype(dtype).name in _LARGEST


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Numbers `[..., H]` -> 8-bit numbers `[..., H]` and scales `[...]`."""
    x, largest = x.astype(jnp.float32), _LARGEST[jnp.dtype(dtype).name]
    scale = (jnp.max(jnp.abs(x), axis=-1) / largest).astype(SCALE_DTYPE)
    y = x / jnp.maximum(scale.astype(jnp.float32), 1e-30)[..., None]
    y = jnp.clip(y, -largest, largest)  # the rounded scale may be a little small
    return (jnp.round(y) if jnp.dtype(dtype) == jnp.int8 else y).astype(dtype), scale


def as_bits(function: Callable[..., jax.Array], x: jax.Array, *others: jax.Array) -> jax.Array:
    """`function(x, *others)`, which only moves rows of arrays of one dtype; on a CPU, small floats as integers.

    XLA's CPU backend would convert a whole array of small floats to read or write some of its rows. Elsewhere they
    are moved as they are: there the change of type could cost a pass over the cache.
    """
    if x.dtype.itemsize > 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return function(x, *others)
    integer = jnp.dtype(f"uint{8 * x.dtype.itemsize}")

    def moved(*arrays: jax.Array) -> jax.Array:
        bits = (jax.lax.bitcast_convert_type(a, integer) for a in arrays)
        return jax.lax.bitcast_convert_type(function(*bits), x.dtype)

    return jax.lax.platform_dependent(x, *others, cpu=moved, default=function)


def dequantize(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """What the numbers stand for: float32, or the values as they are where there are no scales."""
    return values if scales is None else values.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
