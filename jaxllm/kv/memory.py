"""The page arrays of a model: allocate them and write rows into them. Page 0 belongs to nobody: padding writes there.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, T tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kv.layout import PageLayout
from jaxllm.ops.attention.kv import QuantizedPages, as_bits, quantize, split_pages
from jaxllm.sharding.mesh import Placement


def allocate_pages(num_layers: int, layout: PageLayout, placement: Placement) -> list[Any]:
    """Zeroed pages for each layer."""
    like = layout.abstract(placement)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    zeros = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), out_shardings=shardings)
    return [zeros() for _ in range(num_layers)]


def write_pages(pages: Any, kv_TK2H: jax.Array, slots_T: jax.Array) -> Any:
    """Write each token's keys and values at its slot (`page * C + offset`), in place when the arrays are donated."""
    values, scales = split_pages(pages)
    if values.ndim == 4:
        rows = kv_TK2H.reshape(kv_TK2H.shape[0], *values.shape[2:])
        return set_rows(values.reshape(-1, *values.shape[2:]), slots_T, rows).reshape(values.shape)
    _, halves, page_size, _, _ = values.shape
    # Each page holds C rows of keys, then C rows of values (or only C rows that are both).
    keys_at = slots_T + slots_T // page_size * page_size * (halves - 1)
    at = jnp.concatenate([keys_at + i * page_size for i in range(halves)])

    rows = kv_TK2H.transpose(2, 0, 1, 3).reshape(-1, *values.shape[3:])
    if scales is None:
        return set_rows(values.reshape(-1, *values.shape[3:]), at, rows).reshape(values.shape)

    def written(array: jax.Array, rows: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[3:])
        return as_bits(lambda flat, rows: set_rows(flat, at, rows), flat, rows).reshape(array.shape)

    small, scale = quantize(rows, values.dtype)
    return QuantizedPages(written(values, small), written(scales, scale))


def set_rows(flat: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
    """`flat[at] = rows`."""
    return flat.at[at].set(rows.astype(flat.dtype), mode="promise_in_bounds", wrap_negative_indices=False)
