"""KV pages: one array per layer, `[P, C, 2K, H]`, page-major, keys at even and values at odd head indices.

With multi-head latent attention `[P, C, 1, W]`: one row per token, key and value of every head at once.

Allocate and write. Page 0 belongs to nobody: padding rows write there.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, W latent width, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.sharding.mesh import Placement

Dims = tuple[str | None, ...]


def page_dims(cfg: ModelConfig) -> Dims:
    """What the dims of one layer's array mean; a latent row belongs to all heads, so nothing cuts it."""
    return (None, None, None, None) if cfg.latent else (None, None, "heads", "head_dim")


def query_dims(cfg: ModelConfig) -> Dims:
    """The dims of the queries `[T, K, G, H]` that attend to these pages."""
    return ("tokens", None, "heads", None) if cfg.latent else ("tokens", "heads", "group", "head_dim")


def page_shape(cfg: ModelConfig, num_pages: int, page_size: int, kv_copies: int) -> tuple[int, int, int, int]:
    """Shape of one layer's array."""
    if cfg.latent:
        return (num_pages, page_size, 1, cfg.latent.cache_width)
    return (num_pages, page_size, 2 * cfg.num_kv_heads * kv_copies, cfg.head_dim)


def allocate_pages(
    cfg: ModelConfig, num_pages: int, page_size: int, kv_copies: int, dtype: jnp.dtype, placement: Placement
) -> list[jax.Array]:
    """One zeroed array per layer, cut by heads as the rules say."""
    shape = page_shape(cfg, num_pages, page_size, kv_copies)
    zeros = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placement.sharding(*page_dims(cfg)))
    return [zeros() for _ in range(cfg.num_layers)]


def write_pages(pages_PC2KH: jax.Array, kv_TK2H: jax.Array, slots_T: jax.Array) -> jax.Array:
    """Write each token's keys and values at its slot (`page * C + offset`), in place when the array is donated."""
    num_pages, page_size, heads, width = pages_PC2KH.shape
    rows = kv_TK2H.reshape(-1, heads, width).astype(pages_PC2KH.dtype)
    flat = pages_PC2KH.reshape(num_pages * page_size, heads, width)
    return flat.at[slots_T].set(rows, mode="promise_in_bounds", wrap_negative_indices=False).reshape(pages_PC2KH.shape)
