"""KV pages: per layer an array `[P, 2, C, K, H]`: page-major, in a page first all keys, then all values.

With multi-head latent attention `[P, 1, C, 1, W]`: one row per token, key and value of every head at once. Interleaved
`[P, C, 2K, H]` (each head's key, then its value), where a kernel wants it so. An 8-bit cache has a second array, the
scales. Allocate and write. A page is one contiguous run of bytes. Page 0 belongs to nobody: padding rows write there.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, W latent row, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.ops.attention.kv import SCALE_DTYPE, QuantizedPages, as_bits, is_quantized, quantize, split_pages
from jaxllm.sharding.mesh import Placement

Dims = tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Sizes and types of one layer's cache; `num_pages` over all replicas."""

    num_pages: int
    page_size: int
    kv_copies: int
    dtype: jnp.dtype
    interleaved: bool = False

    def abstract(self, cfg: ModelConfig, placement: Placement) -> Any:
        """One layer's pages as shapes with shardings, cut by pages (into replicas) and heads as the rules say."""
        shape, dims = page_shape(cfg, self), page_dims(cfg, interleaved=self.interleaved)
        values = jax.ShapeDtypeStruct(shape, self.dtype, sharding=placement.sharding(*dims))
        if not is_quantized(self.dtype):
            return values
        scales = jax.ShapeDtypeStruct(shape[:-1], SCALE_DTYPE, sharding=placement.sharding(*dims[:-1]))
        return QuantizedPages(values, scales)  # type: ignore[arg-type]


def page_dims(cfg: ModelConfig, *, interleaved: bool = False) -> Dims:
    """What the dims of one layer's array mean; a latent row belongs to all heads, so heads do not cut it."""
    if cfg.latent:
        return ("pages", None, None, None, None)
    return ("pages", None, "heads", "head_dim") if interleaved else ("pages", None, None, "heads", "head_dim")


def page_specs(cfg: ModelConfig, pages: Any, spec: Callable[[Dims], Any]) -> Any:
    """A layer's partition specs, in the shape of its pages."""
    values, scales = split_pages(pages)
    dims = page_dims(cfg, interleaved=values.ndim == 4)
    return spec(dims) if scales is None else QuantizedPages(spec(dims), spec(dims[:-1]))


def query_dims(cfg: ModelConfig) -> Dims:
    """The dims of the queries `[T, K, G, H]` that attend to these pages."""
    return ("tokens", None, "heads", None) if cfg.latent else ("tokens", "heads", "group", "head_dim")


def page_shape(cfg: ModelConfig, layout: PageLayout) -> tuple[int, ...]:
    """Shape of one layer's array."""
    if cfg.latent:
        return (layout.num_pages, 1, layout.page_size, 1, cfg.latent.cache_width)
    heads = cfg.num_kv_heads * layout.kv_copies
    if layout.interleaved:
        return (layout.num_pages, layout.page_size, 2 * heads, cfg.head_dim)
    return (layout.num_pages, 2, layout.page_size, heads, cfg.head_dim)


def page_size_of(pages: Any) -> int:
    """Tokens per page of one layer's pages."""
    values, _ = split_pages(pages)
    return values.shape[-3]


def token_bytes(cfg: ModelConfig, dtype: jnp.dtype, kv_copies: int) -> int:
    """Bytes that one token occupies over all layers, scales included."""
    rows = 1 if cfg.latent else 2 * cfg.num_kv_heads
    scales = cfg.num_layers * rows * SCALE_DTYPE.itemsize if is_quantized(dtype) else 0
    return (cfg.kv_bytes_per_token(jnp.dtype(dtype).itemsize) + scales) * kv_copies


def allocate_pages(cfg: ModelConfig, layout: PageLayout, placement: Placement) -> list[Any]:
    """Zeroed pages for each layer."""
    like = layout.abstract(cfg, placement)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    zeros = jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), out_shardings=shardings)
    return [zeros() for _ in range(cfg.num_layers)]


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
