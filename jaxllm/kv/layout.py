"""How a token's row lies in pages: per layer an array `[P, 2, C, K, H]`, page-major, in a page first all keys.

A row that is key and value at once (latent attention) gives `[P, 1, C, 1, W]`. Interleaved `[P, C, 2K, H]` (each
head's key, then its value), where a kernel wants it so. An 8-bit cache has a second array, the scales. A page is one
contiguous run of bytes, which is why the page comes first: it moves between memories in one piece. The *logical*
layout, in which pages leave a device for disk or another engine, is `[L, 2, C, K, H]` with each head once.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, W latent row, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import CacheRow, ModelConfig
from jaxllm.ops.attention.kv import SCALE_DTYPE, QuantizedPages, at_rest, is_quantized, numbers_dtype, split_pages
from jaxllm.sharding.mesh import Placement

Dims = tuple[str | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Sizes and types of one layer's pages.

    Attributes:
        row: what one token leaves there.
        num_pages: over all replicas.
        page_size: tokens per page.
        kv_copies: how often each key/value head is stored, so that heads divide by the mesh.
        dtype: of the numbers.
        interleaved: each head's value beside its key, for a kernel that wants it so.
        as_integers: small floats are kept as the integers of their bits (`at_rest`).
    """

    row: CacheRow
    num_pages: int
    page_size: int
    kv_copies: int
    dtype: jnp.dtype
    interleaved: bool = False
    as_integers: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer's array."""
        heads = self.row.heads * (self.kv_copies if self.row.is_cut else 1)
        if self.interleaved:
            return (self.num_pages, self.page_size, self.row.halves * heads, self.row.width)
        return (self.num_pages, self.row.halves, self.page_size, heads, self.row.width)

    def abstract(self, placement: Placement) -> Any:
        """One layer's pages as shapes with shardings, cut by pages (into replicas) and heads as the rules say."""
        dims = page_dims(self.row, interleaved=self.interleaved)
        kept, scales_kept = (at_rest(x) if self.as_integers else x for x in (self.dtype, SCALE_DTYPE))
        values = jax.ShapeDtypeStruct(self.shape, kept, sharding=placement.sharding(*dims))
        if not is_quantized(self.dtype):
            return values
        scales = jax.ShapeDtypeStruct(self.shape[:-1], scales_kept, sharding=placement.sharding(*dims[:-1]))
        return QuantizedPages(values, scales)  # type: ignore[arg-type]

    def to_logical(self, leaf: np.ndarray) -> np.ndarray:
        """An array of one page over all layers `[L, ...]` as `[L, 2, C, K, ...]`, each key/value head once."""
        leaf = leaf.view(numbers_dtype(leaf.dtype))
        if self.interleaved:  # [L, C, 2K, ...]: each head's key, then its value
            layers, tokens, rows, *rest = leaf.shape
            leaf = np.moveaxis(leaf.reshape(layers, tokens, rows // 2, 2, *rest), 3, 1)
        return leaf[:, :, :, :: self.kv_copies]

    def from_logical(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_logical`."""
        array = np.repeat(array, self.kv_copies, axis=3) if self.kv_copies > 1 else array
        array = array.view(at_rest(array.dtype)) if self.as_integers else array
        if not self.interleaved:
            return array
        layers, halves, tokens, heads, *rest = array.shape
        return np.moveaxis(array, 1, 3).reshape(layers, tokens, heads * halves, *rest)


def page_dims(row: CacheRow, *, interleaved: bool = False) -> Dims:
    """What the dims of one layer's array mean."""
    if not row.is_cut:
        return ("pages", None, None, None, None)
    return ("pages", None, "heads", "head_dim") if interleaved else ("pages", None, None, "heads", "head_dim")


def page_specs(row: CacheRow, pages: Any, spec: Callable[[Dims], Any]) -> Any:
    """A layer's partition specs, in the shape of its pages."""
    values, scales = split_pages(pages)
    dims = page_dims(row, interleaved=values.ndim == 4)
    return spec(dims) if scales is None else QuantizedPages(spec(dims), spec(dims[:-1]))


def query_dims(row: CacheRow) -> Dims:
    """The dims of the queries `[T, K, G, H]` that attend to these pages: devices share heads or groups of them."""
    return ("tokens", "heads", "group", "head_dim") if row.is_cut else ("tokens", None, "heads", None)


def page_size_of(pages: Any) -> int:
    """Tokens per page of one layer's pages."""
    values, _ = split_pages(pages)
    return values.shape[-3]


def token_bytes(cfg: ModelConfig, dtype: jnp.dtype, kv_copies: int) -> int:
    """Bytes that one token occupies over all layers, scales included."""
    row = cfg.cache_row
    scales = row.num_rows * SCALE_DTYPE.itemsize if is_quantized(dtype) else 0
    return cfg.num_layers * (row.numbers * jnp.dtype(dtype).itemsize + scales) * kv_copies
