"""Ragged paged attention in plain XLA: runs on every backend and is the oracle of the kernels.

Flat queries of many requests and the page arrays -> flat outputs. The work is a list of (query tile, block of
keys) pairs that exist, walked by loops whose trip counts are data: the cost follows the sum of `q_i * kv_i`
rounded up to blocks, never the batch times the longest row. Partial results merge by their maximum and sum
(online softmax: Milakov & Gimelshein 2018; splitting keys over workers: FlashDecoding, Dao et al. 2023).

Dimension letters: T tokens, R rows, Q queries of a tile, S keys of a block, K key/value heads, G query heads per
key/value head, H head width, P pages, C tokens per page, M pages per row, W items of the work list.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.metadata import RaggedRows

_MASKED = -1e30  # finite: an empty row must give 0, not NaN
Partial = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, sum of exponentials, weighted sum of values


def ragged_paged_attention(
    q_TKGH: jax.Array,
    pages_PC2KH: jax.Array,
    rows: RaggedRows,
    *,
    scale: float,
    query_tile: int = 64,
    key_block: int = 128,
) -> jax.Array:
    """Causal attention of every query over its own request's pages.

    Args:
        q_TKGH: queries `[T, K, G, H]`, the flat batch; rows that belong to nobody give zeros.
        pages_PC2KH: this layer's cache, with this iteration's keys and values already written.
        rows: who owns which queries and pages.
        scale: multiplies the scores.
        query_tile: queries of one row processed together.
        key_block: keys processed together; rounded to whole pages.

    Returns:
        `[T, K, G, H]` in the queries' dtype.
    """
    blocks = _Blocks.of(pages_PC2KH, rows.page_table, scale, key_block)
    num_rows = min(rows.q_len.shape[0], q_TKGH.shape[0])
    is_single = jnp.arange(num_rows) < rows.num_single
    kv_len = jnp.where(is_single, rows.kv_len[:num_rows], 0)
    singles = functools.partial(_singles, blocks, q_TKGH[:num_rows], kv_len)
    empty = functools.partial(jnp.zeros, q_TKGH[:num_rows].shape, q_TKGH.dtype)
    out_R = jax.lax.cond(rows.num_single > 0, singles, empty)
    if q_TKGH.shape[0] == 1:
        return out_R
    return _tiles(blocks, q_TKGH, out_R, rows, min(query_tile, q_TKGH.shape[0]))


def single_query_attention(
    q_RKGH: jax.Array, pages_PC2KH: jax.Array, kv_len_R: jax.Array, table_RM: jax.Array, *, scale: float,
    key_block: int = 128,
) -> jax.Array:  # fmt: skip
    """The case of the decode loop: row `r` has the one query `r`; `kv_len = 0` marks an idle row (gives zeros)."""
    return _singles(_Blocks.of(pages_PC2KH, table_RM, scale, key_block), q_RKGH, kv_len_R)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The cache of one layer seen as blocks of `span` keys: block `j` of row `r` is `table[r, j]` `[B]` pages."""

    pages_PC2KH: jax.Array
    table: jax.Array
    span: int
    scale: float

    @classmethod
    def of(cls, pages_PC2KH: jax.Array, table_RM: jax.Array, scale: float, key_block: int) -> _Blocks:
        num_rows, width = table_RM.shape
        per_block = max(1, min(key_block // pages_PC2KH.shape[1], width))
        table = jnp.pad(table_RM, ((0, 0), (0, -width % per_block))).reshape(num_rows, -1, per_block)
        return cls(pages_PC2KH, table, per_block * pages_PC2KH.shape[1], scale)


def _attend(blocks: _Blocks, q: jax.Array, page_ids: jax.Array, visible: jax.Array) -> Partial:
    """Attend a batch of W tiles to one block of keys each.

    q `[W, Q, K, G, H]`, page_ids `[W, B]`, visible `[W, Q]` = keys of this block that each query sees (may be
    negative or beyond the block). Returns maximum and sum `[W, K, G, Q]`, values `[W, K, G, Q, H]`, float32.
    """
    w, _, k, _, h = q.shape
    kv = blocks.pages_PC2KH[page_ids].reshape(w, -1, k, 2, h)
    q = (q * blocks.scale).astype(kv.dtype)
    s_WKGQS = jnp.einsum("WQKGH,WSKH->WKGQS", q, kv[:, :, :, 0], preferred_element_type=jnp.float32)
    seen = jnp.arange(kv.shape[1]) < visible[:, :, None]
    s_WKGQS = jnp.where(seen[:, None, None], s_WKGQS, _MASKED)
    top = jnp.max(s_WKGQS, axis=-1)
    p = jnp.where(seen[:, None, None], jnp.exp(s_WKGQS - top[..., None]), 0.0)
    out = jnp.einsum("WKGQS,WSKH->WKGQH", p.astype(kv.dtype), kv[:, :, :, 1], preferred_element_type=jnp.float32)
    return top, jnp.sum(p, axis=-1), out


def _singles(blocks: _Blocks, q_RKGH: jax.Array, kv_len: jax.Array) -> jax.Array:
    """One query per row. The first block of every row runs straight; what longer rows need is a work list."""
    num_rows, num_blocks = q_RKGH.shape[0], blocks.table.shape[1]
    table, span = blocks.table[:num_rows], blocks.span
    state = _without_q(_attend(blocks, q_RKGH[:, None], table[:, 0], kv_len[:, None]))
    if num_blocks > 1:
        more = jnp.maximum(-(-kv_len // span) - 1, 0)
        ends = jnp.cumsum(more)
        group = min(num_rows, 16)

        def attend_group(i: jax.Array, state: Partial) -> Partial:
            item = i * group + jnp.arange(group)
            row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), num_rows - 1)
            j = jnp.clip(item - (ends[row] - more[row]) + 1, 0, num_blocks - 1)
            visible = jnp.where(item < ends[-1], kv_len[row] - j * span, 0)
            part = _without_q(_attend(blocks, q_RKGH[row][:, None], table[row, j], visible[:, None]))
            return _merge_items(state, part, row)

        state = jax.lax.fori_loop(0, -(-ends[-1] // group), attend_group, state)
    return _finish(state).astype(q_RKGH.dtype)


def _tiles(blocks: _Blocks, q_TKGH: jax.Array, out_R: jax.Array, rows: RaggedRows, tile: int) -> jax.Array:
    """Rows with many queries: one tile of queries after the other, its blocks of keys in an inner loop.

    A tile that runs past its row's end writes rubbish into the next row's place, which that row's own tiles,
    later in the order, overwrite; past the last row lies padding that is cut off.
    """
    num_tokens, k, g, h = q_TKGH.shape
    span = blocks.span
    index = jnp.arange(rows.q_len.shape[0])
    tiles = jnp.where(index < rows.num_single, 0, -(-rows.q_len // tile))
    ends = jnp.cumsum(tiles)
    q_pad = jnp.pad(q_TKGH, ((0, tile), (0, 0), (0, 0), (0, 0)))
    out = jnp.zeros_like(q_pad).at[: out_R.shape[0]].set(out_R)

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(ends, i, side="right")
        offset = (i - (ends[row] - tiles[row])) * tile
        start = rows.q_start[row] + offset
        q = jax.lax.dynamic_slice_in_dim(q_pad, start, tile)[None]
        positions = rows.kv_len[row] - rows.q_len[row] + offset + jnp.arange(tile)
        last = jnp.minimum(rows.kv_len[row], positions[-1] + 1)
        row_table = blocks.table[row]

        def attend_block(j: jax.Array, state: Partial) -> Partial:
            return _merge(state, _attend(blocks, q, row_table[j][None], (positions + 1 - j * span)[None]))

        state = jax.lax.fori_loop(0, -(-last // span), attend_block, _nothing((1, k, g, tile), h))
        values = _finish(state)[0].transpose(2, 0, 1, 3).astype(out.dtype)
        values = jnp.where((jnp.arange(tile) < rows.q_len[row] - offset)[:, None, None, None], values, 0)
        return jax.lax.dynamic_update_slice_in_dim(out, values, start, axis=0)

    return jax.lax.fori_loop(0, ends[-1], attend_tile, out)[:num_tokens]


def _merge(a: Partial, b: Partial) -> Partial:
    """Join two partial softmaxes over disjoint keys."""
    top = jnp.maximum(a[0], b[0])
    fa, fb = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
    return top, a[1] * fa + b[1] * fb, a[2] * fa[..., None] + b[2] * fb[..., None]


def _merge_items(state: Partial, part: Partial, row_W: jax.Array) -> Partial:
    """Join W partial results into the rows they belong to; several may belong to one row.

    One-hot products instead of scatters: W and R are small and XLA's CPU scatter is a serial loop.
    """
    onehot_RW = row_W == jnp.arange(state[0].shape[0])[:, None]
    top = jnp.max(jnp.where(onehot_RW[:, :, None, None], part[0], _MASKED), axis=1)
    top = jnp.maximum(state[0], top)
    keep, weight = jnp.exp(state[0] - top), onehot_RW.astype(jnp.float32)
    factor = jnp.exp(part[0] - top[row_W])
    total = jnp.einsum("RW,WKG->RKG", weight, part[1] * factor, precision="highest")
    values = jnp.einsum("RW,WKGH->RKGH", weight, part[2] * factor[..., None], precision="highest")
    return top, state[1] * keep + total, state[2] * keep[..., None] + values


def _finish(state: Partial) -> jax.Array:
    """Normalise; a row that saw no key gives 0."""
    return state[2] / jnp.maximum(state[1], 1e-30)[..., None]


def _nothing(shape: tuple[int, ...], width: int) -> Partial:
    return jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, width))


def _without_q(state: Partial) -> Partial:
    """Drop the query dim of single-query tiles."""
    return state[0][..., 0], state[1][..., 0], state[2][..., 0, :]

