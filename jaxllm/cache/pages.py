"""KV pages: one array per layer, `[P, 2, C, K, H]`: page-major, in a page first all keys, then all values.

With multi-head latent attention `[P, 1, C, 1, W]`: one row per token, key and value of every head at once.
Allocate and write. A page is one contiguous run of bytes, and so are the keys (or values) of one token over all
heads. Page 0 belongs to nobody: padding rows write there.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, W latent row, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.sharding.mesh import Placement

Dims = tuple[str | None, ...]


def page_dims(cfg: ModelConfig) -> Dims:
    """What the dims of one layer's array mean; a latent row belongs to all heads, so heads do not cut it."""
    return ("pages", None, None, None, None) if cfg.latent else ("pages", None, None, "heads", "head_dim")


def query_dims(cfg: ModelConfig) -> Dims:
    """The dims of the queries `[T, K, G, H]` that attend to these pages."""
    return ("tokens", None, "heads", None) if cfg.latent else ("tokens", "heads", "group", "head_dim")


def page_shape(cfg: ModelConfig, num_pages: int, page_size: int, kv_copies: int) -> tuple[int, ...]:
    """Shape of one layer's array."""
    if cfg.latent:
        return (num_pages, 1, page_size, 1, cfg.latent.cache_width)
    return (num_pages, 2, page_size, cfg.num_kv_heads * kv_copies, cfg.head_dim)


def allocate_pages(
    cfg: ModelConfig, num_pages: int, page_size: int, kv_copies: int, dtype: jnp.dtype, placement: Placement
) -> list[jax.Array]:
    """One zeroed array per layer, cut by pages (into replicas) and heads as the rules say."""
    shape = page_shape(cfg, num_pages, page_size, kv_copies)
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placement.sharding(*page_dims(cfg)))
    return [zeros() for _ in range(cfg.num_layers)]


def write_pages(pages_P2CKH: jax.Array, kv_TK2H: jax.Array, slots_T: jax.Array) -> jax.Array:
    """Write each token's keys and values at its slot (`page * C + offset`), in place when the array is donated."""
    num_pages, halves, page_size, k, h = pages_P2CKH.shape
    rows = kv_TK2H.transpose(2, 0, 1, 3).reshape(-1, k, h).astype(pages_P2CKH.dtype)
    # Each page holds C rows of keys, then C rows of values (or only C rows that are both).
    keys_at = slots_T + slots_T // page_size * page_size * (halves - 1)
    flat = pages_P2CKH.reshape(num_pages * halves * page_size, k, h)
    at = flat.at[jnp.concatenate([keys_at + i * page_size for i in range(halves)])]
    return at.set(rows, mode="promise_in_bounds", wrap_negative_indices=False).reshape(pages_P2CKH.shape)
