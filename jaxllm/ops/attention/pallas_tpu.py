"""Ragged paged attention on TPUs: JAX's own Pallas kernel, on interleaved pages `[P, C, 2K, H]`.

Flat queries, pages, rows -> flat outputs, equal to `xla`. The kernel (jax.experimental.pallas.ops.tpu) takes prefill
and decode rows together and is tuned for the hardware; this file translates rows and says what it cannot take. Block
sizes are given, not looked up: the look-up asks the default device which chip it is, and programs are also compiled
ahead of time for chips that are not there.

Dimension letters: T tokens, R rows, K key/value heads, G query heads per key/value head, H head width, P pages,
C tokens per page, M pages per row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from jaxllm.config import ModelConfig
from jaxllm.ops.attention.kv import is_quantized
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows

_KEYS = 512  # of a block: 4 MB of on-chip memory for both buffers with 8 heads of 128
_QUERIES = 32  # of a block
_LANES = 128


def unsupported(cfg: ModelConfig, dtype: jnp.dtype, num_kv_heads: int) -> str | None:
    """Why the kernel cannot serve a model with this cache and so many key/value heads per device, or None."""
    dtype = jnp.dtype(dtype)
    packed = 4 // dtype.itemsize
    rows = 2 * num_kv_heads // packed
    if not cfg.cache_row.is_cut:
        return "latent attention"
    if cfg.attention_sinks:
        return "attention sinks"
    if is_quantized(dtype):
        return f"a {dtype.name} cache with scales of its own for every token"
    if cfg.head_dim % _LANES:
        return f"head width {cfg.head_dim} is not a multiple of {_LANES}"
    if 2 * num_kv_heads % packed or not (rows in (1, 2, 4, 8) or rows % 8 == 0):
        return f"{num_kv_heads} key/value heads per device do not fill its tiles"
    return None


def attention(
    q_TKGH: jax.Array, pages_PC2KH: jax.Array, rows: RaggedRows | SingleRows, *, spec: AttentionSpec
) -> jax.Array:
    """As `select.attention`; rows with queries stand first, without a gap between their queries."""
    t, k, g, h = q_TKGH.shape
    if isinstance(rows, SingleRows):
        is_real = rows.kv_len > 0
        num_rows, kv_len = t, jnp.maximum(rows.kv_len, 1)  # an idle row looks at page 0 for nothing
        table, ends = jnp.where(is_real[:, None], rows.page_table, 0), jnp.arange(t + 1)
    else:
        is_real = jnp.arange(t) < jnp.sum(rows.q_len)
        num_rows, kv_len, table = jnp.sum(rows.q_len > 0), rows.kv_len, rows.page_table
        ends = jnp.pad(jnp.cumsum(rows.q_len), (1, 0))
    page_size, pages_per_row = pages_PC2KH.shape[1], table.shape[1]
    integers: Any = (jnp.asarray(x, jnp.int32) for x in (kv_len, table, ends, jnp.reshape(num_rows, (1,))))
    out = ragged_paged_attention(
        q_TKGH.reshape(t, k * g, h).astype(pages_PC2KH.dtype),
        pages_PC2KH,
        *integers,
        sm_scale=spec.scale,
        sliding_window=spec.window,
        soft_cap=spec.softcap,
        num_kv_pages_per_block=max(1, min(pages_per_row, _KEYS // page_size)),
        num_queries_per_block=min(t, _QUERIES),
    )
    return jnp.where(is_real[:, None, None], out, 0).reshape(q_TKGH.shape).astype(q_TKGH.dtype)
