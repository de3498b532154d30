"""Ragged paged attention in plain XLA: runs on every backend and is the oracle of the kernels.

Flat queries of many requests and the page arrays -> flat outputs. The work is a list of (query tile, block of
keys) pairs that exist, walked by loops whose trip counts are data: the cost follows the sum of `q_i * kv_i`
rounded up to blocks, never the batch times the longest row. Partial results merge by their maximum and sum
(online softmax: Milakov & Gimelshein 2018; splitting keys over workers: FlashDecoding, Dao et al. 2023).

Dimension letters: T tokens, R rows, Q queries of a tile, S keys of a block, K key/value heads, G query heads per
key/value head, X = K*G query heads, H head width, P pages, C tokens per page, B pages per block, W items worked on
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.kv import as_numbers, dequantize, numbers_dtype, split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows

_MASKED = -1e30  # finite: differences of two masked scores must not be NaN
_MAX_GROUP = 16  # work items of single-query rows attended together
Partial = tuple[jax.Array, jax.Array, jax.Array]  # running maximum, sum of exponentials, weighted sum of values


def ragged_paged_attention(
    q_TKGH: jax.Array,
    pages: Any,
    rows: RaggedRows,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    query_tile: int = 64,
    key_block: int = 64,
) -> jax.Array:
    """Causal attention of every query over its own request's pages.

    Args:
        q_TKGH: queries `[T, K, G, H]`, the flat batch; rows that belong to nobody give zeros.
        pages: this layer's cache (`[P, 2, C, K, H]`, quantised, or interleaved `[P, C, 2K, H]`), with this iteration's
            keys and values already written.
        rows: who owns which queries and pages.
        spec: scale, window, soft-cap and where the values are.
        sinks_KG: a logit per query head that takes part in the softmax and gives no value.
        query_tile: queries of one row processed together.
        key_block: keys processed together with such a tile; rounded to whole pages.

    Returns:
        `[T, K, G, H]` in the queries' dtype; the last dim is the values' width.
    """
    num_tokens = q_TKGH.shape[0]
    num_rows = min(rows.q_len.shape[0], num_tokens)
    kv_len = jnp.where(jnp.arange(num_rows) < rows.num_single, rows.kv_len[:num_rows], 0)
    singles_RKGH = single_query_attention(
        q_TKGH[:num_rows], pages, kv_len, rows.page_table[:num_rows], spec=spec, sinks_KG=sinks_KG
    )
    blocks = _Blocks.of(pages, rows.page_table, spec, key_block)
    return _tiles(blocks, q_TKGH, singles_RKGH, rows, min(query_tile, num_tokens), sinks_KG)


def single_query_attention(
    q_RKGH: jax.Array,
    pages: Any,
    kv_len_R: jax.Array,
    table_RM: jax.Array,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    key_block: int = 64,
) -> jax.Array:
    """Row `r` has the one query `r`, as in a decode; `kv_len = 0` marks an idle row (gives zeros, costs nothing).

    The (row, block) pairs that exist are attended some at a time, whatever rows they belong to.
    """
    blocks = _Blocks.of(pages, table_RM, spec, key_block)
    (num_rows, k, g, h), num_blocks = q_RKGH.shape, blocks.table.shape[1]
    group = min(num_rows, _MAX_GROUP)
    first = blocks.first(kv_len_R)
    count = -(-kv_len_R // blocks.span) - first
    ends = jnp.cumsum(count)
    facts = jnp.stack([kv_len_R, ends - count - first], axis=1)

    def attend_group(i: jax.Array, state: Partial) -> Partial:
        item = i * group + jnp.arange(group)
        row = jnp.minimum(jnp.sum(ends <= item[:, None], axis=1), num_rows - 1)
        length, begin = jnp.split(_take(facts, row), 2, axis=1)
        j = jnp.minimum(item[:, None] - begin, num_blocks - 1)
        visible = jnp.where(item[:, None] < ends[-1], length - j * blocks.span, 0)
        page_ids = _take(blocks.table.reshape(-1, blocks.table.shape[2]), row * num_blocks + j[:, 0])
        part = _attend_rows(blocks, _take(q_RKGH, row), page_ids, visible)
        return _merge_items(state, part, row)

    state = _nothing((num_rows, k, g), spec.value_width or h)
    state = jax.lax.fori_loop(0, -(-ends[-1] // group), attend_group, state)
    return _finish(_with_sinks(state, sinks_KG), kv_len_R[:, None, None] > 0).astype(q_RKGH.dtype)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The cache of one layer seen as blocks of `span` keys: block `j` of row `r` is pages `table[r, j]`."""

    values: jax.Array
    scales: jax.Array | None
    table: jax.Array
    span: int
    spec: AttentionSpec

    @classmethod
    def of(cls, pages: Any, table_RM: jax.Array, spec: AttentionSpec, key_block: int) -> _Blocks:
        num_rows, width = table_RM.shape
        values, scales = split_pages(pages)
        page_size = values.shape[-3]
        per_block = max(1, min(key_block // page_size, width))
        table = jnp.pad(table_RM, ((0, 0), (0, -width % per_block))).reshape(num_rows, -1, per_block)
        return cls(values, scales, table, per_block * page_size, spec)

    @property
    def dtype(self) -> jnp.dtype:
        """Of keys and values in products."""
        return numbers_dtype(self.values.dtype) if self.scales is None else jnp.dtype(jnp.float32)

    def first(self, length: jax.Array) -> jax.Array | int:
        """Number of the first block that a query with `length` keys before and at it sees anything of."""
        return 0 if self.spec.window is None else jnp.maximum(length - self.spec.window, 0) // self.span

    def gather(self, page_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of some blocks: `[..., B]` page numbers -> two `[..., S, K, H]`."""
        if self.values.ndim == 4:  # interleaved
            both = _take(self.values, page_ids).reshape(*page_ids.shape[:-1], self.span, -1, 2, self.values.shape[-1])
            return both[..., 0, :], both[..., 1, :]
        keys = self._half(page_ids, 0)
        if self.spec.value_width is not None:
            return keys, keys[..., : self.spec.value_width]
        return keys, self._half(page_ids, 1)

    def _half(self, page_ids: jax.Array, half: int) -> jax.Array:
        """Keys (0) or values (1) `[..., S, K, H]`."""

        def rows_of(array: jax.Array) -> jax.Array:
            num_pages, halves, page_size, *rest = array.shape
            flat = array.reshape(halves * num_pages, page_size, *rest)
            rows = as_numbers(_take(flat, halves * page_ids + half))
            return rows.reshape(*page_ids.shape[:-1], self.span, *rest)

        return dequantize(rows_of(self.values), None if self.scales is None else rows_of(self.scales))

    def seen(self, first: jax.Array, last: jax.Array) -> jax.Array:
        """Which keys `[..., S]` are seen by any query whose `visible` lies from `first` to `last`, `[..., 1]`."""
        position = jnp.arange(self.span)
        if self.spec.window is None:
            return position < last
        return (position < last) & (position >= first - self.spec.window)

    def score(self, scores: jax.Array, visible: jax.Array) -> jax.Array:
        """Soft-cap the scores `[..., S]` and mask what a query does not see; `visible [..., 1]`."""
        if (cap := self.spec.softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        return jnp.where(self.seen(visible, visible), scores, _MASKED)


def _attend_rows(blocks: _Blocks, q_WKGH: jax.Array, page_ids: jax.Array, visible: jax.Array) -> Partial:
    """Attend W single queries to one block of keys each.

    All heads go through one product with a block-diagonal query `[X, K*H]`: K times the multiplications, but the
    keys and values are read as they lie, and a decode waits for memory, not for multiplications.

    Args:
        page_ids: `[W, B]`.
        visible: `[W, 1]`, keys from the block's start that lie at or before the query (may be negative or beyond
            the block). A query that sees nothing has maximum `_MASKED`: whatever its sum and values are, merging
            drops them.

    Returns:
        Maximum and sum `[W, K, G]`, values `[W, K, G, H]`, float32.
    """
    w, k, g, h = q_WKGH.shape
    keys, values = (x.reshape(w, blocks.span, -1) for x in blocks.gather(page_ids))
    values = jnp.where(blocks.seen(visible, visible)[..., None], values, 0)  # 0 times what was left there is NaN
    own = jnp.eye(k, dtype=keys.dtype)[:, None, :, None]
    q = ((q_WKGH * blocks.spec.scale).astype(keys.dtype)[:, :, :, None] * own).reshape(w, k * g, k * h)
    s_WXS = jnp.einsum("WXD,WSD->WXS", q, keys, preferred_element_type=jnp.float32)
    s_WXS = blocks.score(s_WXS, visible[:, :, None])
    top = jnp.max(s_WXS, axis=-1)
    p = jnp.exp(s_WXS - top[..., None])
    out = jnp.einsum("WXS,WSD->WXD", p.astype(keys.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.einsum("WKGKH->WKGH", out.reshape(w, k, g, k, -1))
    return top.reshape(w, k, g), jnp.sum(p, axis=-1).reshape(w, k, g), out


def _attend_tile(
    blocks: _Blocks, q_KXH: jax.Array, page_ids: jax.Array, visible: jax.Array, last: jax.Array
) -> Partial:
    """Attend a tile of queries of one row to one block: as `_attend_rows`, with `[B]` pages.

    The queries come scaled and with the heads in front, X = Q*G, and so do results and `visible` `[X]`: nothing of
    the size of the scores is ever transposed. `last` is what the row's own last query of the tile sees.

    Returns maximum and sum `[K, X]`, values `[K, X, H]`, float32.
    """
    keys_SKH, values_SKH = blocks.gather(page_ids)
    values_SKH = jnp.where(blocks.seen(visible[:1], last)[:, None, None], values_SKH, 0)  # as in `_attend_rows`
    s_KXS = jnp.einsum("KXH,SKH->KXS", q_KXH, keys_SKH, preferred_element_type=jnp.float32)
    s_KXS = blocks.score(s_KXS, visible[:, None])
    top = jnp.max(s_KXS, axis=-1)
    p = jnp.exp(s_KXS - top[..., None])
    out = jnp.einsum("KXS,SKH->KXH", p.astype(keys_SKH.dtype), values_SKH, preferred_element_type=jnp.float32)
    return top, jnp.sum(p, axis=-1), out


def _tiles(
    blocks: _Blocks, q_TKGH: jax.Array, singles_RKGH: jax.Array, rows: RaggedRows, tile: int, sinks_KG: jax.Array | None
) -> jax.Array:
    """Rows with many queries: one tile of queries after the other, its blocks of keys in an inner loop.

    A tile that runs past its row's end writes zeros into the next row's place, which that row's own tiles,
    later in the order, overwrite; past the last row lies padding that is cut off.
    """
    (num_tokens, k, g, _), h = q_TKGH.shape, singles_RKGH.shape[-1]
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
        q = jax.lax.dynamic_slice_in_dim(q_pad, start, tile).transpose(1, 0, 2, 3).reshape(k, tile * g, -1)
        q = (q * blocks.spec.scale).astype(blocks.dtype)
        sees = kv_len - q_len + offset + 1 + jnp.arange(tile * g) // g  # keys each query sees: its own and before
        last = jnp.minimum(kv_len, kv_len - q_len + offset + tile)
        page_ids = _take(blocks.table, row)

        def attend_block(j: jax.Array, state: Partial) -> Partial:
            begin = j * blocks.span
            return _merge(state, _attend_tile(blocks, q, _take(page_ids, j), sees - begin, last - begin))

        state = _nothing((k, tile * g), h)
        state = jax.lax.fori_loop(blocks.first(sees[0]), -(-last // blocks.span), attend_block, state)
        state = _with_sinks(state, None if sinks_KG is None else jnp.tile(sinks_KG, (1, tile)))
        is_mine = jnp.arange(tile * g) // g < q_len - offset
        values = _finish(state, is_mine).reshape(k, tile, g, h).transpose(1, 0, 2, 3).astype(out.dtype)
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
    # A product with zeros would spread what is not finite in one row over all of them.
    is_bad_W = ~jnp.isfinite(values_and_sum).all(axis=(1, 2, 3))
    values_and_sum = jnp.where(is_bad_W[:, None, None, None], 0.0, values_and_sum)
    total = jnp.einsum("RW,WKGX->RKGX", weight, values_and_sum, precision="highest")
    total = jnp.where((onehot_RW & is_bad_W).any(axis=1)[:, None, None, None], jnp.nan, total)
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


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` for an index that is known to be in range."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
