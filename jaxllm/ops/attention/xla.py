"""Ragged paged attention in plain XLA: runs on every backend and is the oracle of the kernels.

Flat queries of many requests and the page arrays -> flat outputs. The work is a list of (query tile, block of
keys) pairs that exist, walked by loops whose trip counts are data: the cost follows the sum of `q_i * kv_i`
rounded up to blocks, never the batch times the longest row. Partial results merge by their maximum and sum
(online softmax: Milakov & Gimelshein 2018; splitting keys over workers: FlashDecoding, Dao et al. 2023).

Dimension letters: T tokens, R rows, Q queries of a tile, S keys of a block, K key/value heads, G query heads per
key/value head, H head width, P pages, C tokens per page, M pages per row, W items worked on together.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows

_MASKED = -1e30  # finite: differences of two masked scores must not be NaN
_GROUP = 16  # work items of single-query rows attended together
Partial = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, sum of exponentials, weighted sum of values


def ragged_paged_attention(
    q_TKGH: jax.Array,
    pages_PC2KH: jax.Array,
    rows: RaggedRows,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    query_tile: int = 64,
    key_block: int = 128,
) -> jax.Array:
    """Causal attention of every query over its own request's pages.

    Args:
        q_TKGH: queries `[T, K, G, H]`, the flat batch; rows that belong to nobody give zeros.
        pages_PC2KH: this layer's cache, with this iteration's keys and values already written.
        rows: who owns which queries and pages.
        spec: scale, window, soft-cap and where the values are.
        sinks_KG: a logit per query head that takes part in the softmax and gives no value.
        query_tile: queries of one row processed together.
        key_block: keys processed together; rounded to whole pages.

    Returns:
        `[T, K, G, H]` in the queries' dtype; the last dim is the values' width.
    """
    num_tokens, k, g, h = q_TKGH.shape
    num_rows = min(rows.q_len.shape[0], num_tokens)
    blocks = _Blocks.of(pages_PC2KH, rows.page_table, spec, key_block)
    is_single = jnp.arange(num_rows) < rows.num_single
    kv_len = jnp.where(is_single, rows.kv_len[:num_rows], 0)
    state = _nothing((num_rows, k, g), spec.value_width or h)
    state = _walk(blocks, q_TKGH[:num_rows], kv_len, blocks.first(kv_len), state)
    singles_RKGH = _finish(_with_sinks(state, sinks_KG), kv_len[:, None, None] > 0).astype(q_TKGH.dtype)
    return _tiles(blocks, q_TKGH, singles_RKGH, rows, min(query_tile, num_tokens), sinks_KG)


def single_query_attention(
    q_RKGH: jax.Array,
    pages_PC2KH: jax.Array,
    kv_len_R: jax.Array,
    table_RM: jax.Array,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    key_block: int = 128,
) -> jax.Array:
    """The case of the decode loop: row `r` has the one query `r`; `kv_len = 0` marks an idle row (gives zeros).

    The first block of every row is attended straight, so that a batch of short rows pays for no loop.
    """
    blocks = _Blocks.of(pages_PC2KH, table_RM, spec, key_block)
    first = blocks.first(kv_len_R)
    if spec.window is None:
        page_ids, visible = blocks.table[:, 0], kv_len_R
    else:
        page_ids = _take(blocks.table, (jnp.arange(first.shape[0]), first))
        visible = kv_len_R - first * blocks.span
    state = _drop_q(_attend(blocks, q_RKGH[:, None], page_ids, visible[:, None]))
    if blocks.table.shape[1] > 1:
        state = _walk(blocks, q_RKGH, kv_len_R, first + 1, state)
    return _finish(_with_sinks(state, sinks_KG), kv_len_R[:, None, None] > 0).astype(q_RKGH.dtype)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The cache of one layer seen as blocks of `span` keys: block `j` of row `r` is pages `table[r, j]`."""

    pages_PC2KH: jax.Array
    table: jax.Array
    span: int
    spec: AttentionSpec

    @classmethod
    def of(cls, pages_PC2KH: jax.Array, table_RM: jax.Array, spec: AttentionSpec, key_block: int) -> _Blocks:
        num_rows, width = table_RM.shape
        per_block = max(1, min(key_block // pages_PC2KH.shape[1], width))
        table = jnp.pad(table_RM, ((0, 0), (0, -width % per_block))).reshape(num_rows, -1, per_block)
        return cls(pages_PC2KH, table, per_block * pages_PC2KH.shape[1], spec)

    def first(self, length: jax.Array) -> jax.Array:
        """Number of the first block that a query with `length` visible keys sees anything of."""
        if self.spec.window is None:
            return jnp.zeros_like(length)
        return jnp.maximum(length - self.spec.window, 0) // self.span


def _attend(blocks: _Blocks, q: jax.Array, page_ids: jax.Array, visible: jax.Array) -> Partial:
    """Attend a batch of W tiles to one block of keys each.

    q `[W, Q, K, G, H]`, page_ids `[W, B]`, visible `[W, Q]` = keys from the start of this block that each query
    sees, where no window hides them (may be negative or beyond the block). Returns maximum and sum `[W, K, G, Q]`, values `[W, K, G, Q, H]`, float32.
    A query that sees nothing has maximum `_MASKED`: whatever its sum and values are, merging drops them.
    """
    spec = blocks.spec
    key, value = _keys_and_values(_take(blocks.pages_PC2KH, page_ids), q.shape[2], spec)
    q = (q * spec.scale).astype(key.dtype)
    s_WKGQS = jnp.einsum("WQKGH,WSKH->WKGQS", q, key, preferred_element_type=jnp.float32)
    if spec.softcap is not None:
        s_WKGQS = spec.softcap * jnp.tanh(s_WKGQS / spec.softcap)
    end = visible[:, None, None, :, None]
    position = jnp.arange(key.shape[1])
    seen = position < end if spec.window is None else (position < end) & (position >= end - spec.window)
    s_WKGQS = jnp.where(seen, s_WKGQS, _MASKED)
    top = jnp.max(s_WKGQS, axis=-1)
    p = jnp.exp(s_WKGQS - top[..., None])
    out = jnp.einsum("WKGQS,WSKH->WKGQH", p.astype(key.dtype), value, preferred_element_type=jnp.float32)
    return top, jnp.sum(p, axis=-1), out


def _keys_and_values(pages: jax.Array, num_heads: int, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Pages `[W, B, C, X, H]` -> keys and values `[W, S, K, H]`."""
    w, h = pages.shape[0], pages.shape[-1]
    if spec.value_width is not None:
        key = pages.reshape(w, -1, num_heads, h)
        return key, key[..., : spec.value_width]
    kv = pages.reshape(w, -1, num_heads, 2, h)
    return kv[:, :, :, 0], kv[:, :, :, 1]


def _walk(blocks: _Blocks, q_RKGH: jax.Array, kv_len: jax.Array, first: jax.Array, state: Partial) -> Partial:
    """Attend rows of one query to their blocks from number `first [R]` on, `_GROUP` (row, block) pairs at a time."""
    num_rows, num_blocks = q_RKGH.shape[0], blocks.table.shape[1]
    count = jnp.maximum(-(-kv_len // blocks.span) - first, 0)
    ends = jnp.cumsum(count)
    facts = jnp.stack([kv_len, ends - count - first], axis=1)

    def attend_group(i: jax.Array, state: Partial) -> Partial:
        item = i * _GROUP + jnp.arange(_GROUP)
        row = jnp.minimum(jnp.sum(ends <= item[:, None], axis=1), num_rows - 1)
        length, begin = jnp.split(_take(facts, row), 2, axis=1)
        j = jnp.minimum(item[:, None] - begin, num_blocks - 1)
        visible = jnp.where(item[:, None] < ends[-1], length - j * blocks.span, 0)
        page_ids = _take(blocks.table.reshape(-1, blocks.table.shape[2]), row * num_blocks + j[:, 0])
        part = _drop_q(_attend(blocks, _take(q_RKGH, row)[:, None], page_ids, visible))
        return _merge_items(state, part, row)

    return jax.lax.fori_loop(0, -(-ends[-1] // _GROUP), attend_group, state)


def _tiles(
    blocks: _Blocks, q_TKGH: jax.Array, singles_RKGH: jax.Array, rows: RaggedRows, tile: int, sinks_KG: jax.Array | None
) -> jax.Array:
    """Rows with many queries: one tile of queries after the other, its blocks of keys in an inner loop.

    A tile that runs past its row's end writes zeros into the next row's place, which that row's own tiles,
    later in the order, overwrite; past the last row lies padding that is cut off.
    """
    num_tokens, k, g, _ = q_TKGH.shape
    h = singles_RKGH.shape[-1]
    tiles = jnp.where(jnp.arange(rows.q_len.shape[0]) < rows.num_single, 0, -(-rows.q_len // tile))
    ends = jnp.cumsum(tiles)
    facts = jnp.stack([rows.q_start, rows.q_len, rows.kv_len, ends - tiles], axis=1)
    q_pad = jnp.pad(q_TKGH, ((0, tile), (0, 0), (0, 0), (0, 0)))
    out = jnp.pad(singles_RKGH, ((0, q_pad.shape[0] - singles_RKGH.shape[0]), (0, 0), (0, 0), (0, 0)))

    def attend_tile(i: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.sum(ends <= i)
        q_start, q_len, kv_len, begin = _take(facts, row)
        offset = (i - begin) * tile
        start = q_start + offset
        q = jax.lax.dynamic_slice_in_dim(q_pad, start, tile)[None]
        sees = (kv_len - q_len + offset + 1 + jnp.arange(tile))[None]  # keys each query sees: its own and before
        last = jnp.minimum(kv_len, kv_len - q_len + offset + tile)
        page_ids = _take(blocks.table, row)

        def attend_block(j: jax.Array, state: Partial) -> Partial:
            return _merge(state, _attend(blocks, q, _take(page_ids, j)[None], sees - j * blocks.span))

        first = blocks.first(sees[0, 0])
        state = jax.lax.fori_loop(first, -(-last // blocks.span), attend_block, _nothing((1, k, g, tile), h))
        state = _with_sinks(state, None if sinks_KG is None else sinks_KG[..., None])
        is_mine = jnp.arange(tile) < q_len - offset
        values = _finish(state, is_mine)[0].transpose(2, 0, 1, 3).astype(out.dtype)
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
    factor = jnp.exp(part[0] - _take(top, row_W))
    values_and_sum = jnp.concatenate([part[2], part[1][..., None]], axis=-1) * factor[..., None]
    total = jnp.einsum("RW,WKGX->RKGX", weight, values_and_sum, precision="highest")
    return top, state[1] * keep + total[..., -1], state[2] * keep[..., None] + total[..., :-1]


def _with_sinks(state: Partial, sinks: jax.Array | None) -> Partial:
    """Each head's sink as one more key whose value is zero."""
    if sinks is None:
        return state
    sink = jnp.broadcast_to(sinks.astype(jnp.float32), state[0].shape)
    return _merge(state, (sink, jnp.ones_like(sink), jnp.zeros_like(state[2])))


def _finish(state: Partial, is_real: jax.Array) -> jax.Array:
    """Normalise; what saw no key gives 0."""
    return jnp.where(is_real[..., None], state[2] / jnp.maximum(state[1], 1e-30)[..., None], 0.0)


def _nothing(shape: tuple[int, ...], width: int) -> Partial:
    return jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, width))


def _drop_q(state: Partial) -> Partial:
    """Drop the query dim of single-query tiles."""
    return state[0][..., 0], state[1][..., 0], state[2][..., 0, :]


def _take(x: jax.Array, index: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """`x[index]` for an index that is known to be in range."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
