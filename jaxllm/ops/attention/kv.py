"""One layer's cached keys and values: a plain array of pages, or 8-bit numbers and their scales.

Quantise and dequantise, nothing else: where rows lie in the pages is `jaxllm.kv`'s business. Each key and each value
(one token, one head) has a scale of its own, so writing a token never touches another's:

    scale = max|x| / largest,  stored = round(x / scale),  x ~ stored * scale

with `largest` 127 for int8 and 448 for float8_e4m3fn. Scales are bfloat16, and numbers are divided by the rounded
scale, so its rounding costs nothing.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

SCALE_DTYPE = jnp.dtype(jnp.bfloat16)
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
_AT_REST = {"bfloat16": "uint16", "float16": "int16", "float8_e4m3fn": "uint8"}
_NUMBERS = {integer: number for number, integer in _AT_REST.items()}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedPages:
    """Pages of 8-bit keys and values; both leaves are page-major, so pages move by `jax.tree.map`.

    Attributes:
        values: int8 or float8_e4m3fn `[P, 2, C, K, H]` (latent rows: `[P, 1, C, 1, W]`).
        scales: bfloat16, the same without the last dim.

    Either may lie there as integers of the same bits (`at_rest`).
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


def at_rest(dtype: jnp.dtype) -> jnp.dtype:
    """The integers that keep the bits of small floats, or the dtype itself.

    XLA's CPU backend converts (or copies) a whole array of small floats to read or write some of its rows, so a cache
    lies there as integers.
    """
    return jnp.dtype(_AT_REST.get(jnp.dtype(dtype).name, dtype))


def numbers_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Of the numbers that an array of a cache stands for: the inverse of `at_rest`."""
    return jnp.dtype(_NUMBERS.get(jnp.dtype(dtype).name, dtype))


def as_numbers(x: jax.Array) -> jax.Array:
    """Rows of a cache as the numbers they stand for."""
    return jax.lax.bitcast_convert_type(x, numbers_dtype(x.dtype)) if x.dtype.name in _NUMBERS else x


def as_kept(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers as a cache of this dtype keeps them."""
    x = x.astype(numbers_dtype(dtype))
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def dequantize(values: jax.Array, scales: jax.Array | None) -> jax.Array:
    """What the numbers stand for: float32, or the values as they are where there are no scales."""
    return values if scales is None else values.astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
