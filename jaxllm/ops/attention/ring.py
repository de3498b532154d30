"""Ring attention over a flat ragged batch: one device's part, for use inside `jax.shard_map`.

The tokens of an iteration are cut over the devices of one mesh axis, their keys and values go round the ring, and
every device attends its own queries to whatever passes (Liu et al. 2023). What was in the cache before comes from the
device's own copy of the pages. Partial results merge by maximum and sum. Knows nothing of requests.

Order: the batch is cut into 2p pieces and device `i` of `p` holds pieces `i` and `2p - 1 - i` (zig-zag), so that all
have the same number of (query, key) pairs to work on at each step, although later tokens see more keys.

Dimension letters: T tokens of the whole batch, U tokens of a piece (T / 2p), K key/value heads, G query heads per
key/value head, H head width, X = U * G queries of a piece, S keys attended together, R rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.attention.kv import dequantize, numbers_dtype, quantize, split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows
from jaxllm.ops.attention.xla import _MASKED, Partial, _Blocks, _finish, _merge, _nothing, _take, _with_sinks

_KEYS = 256  # of a piece that passes, attended together
_TILE = 64  # queries attended to the cache together


def zigzag(num_tokens: int, num_devices: int, num_sections: int = 1) -> np.ndarray:
    """Flat index of the token at each place, `[T]`; each of some equal sections is ordered by itself."""
    pieces = np.arange(num_tokens // num_sections).reshape(2 * num_devices, -1)
    order = np.concatenate([pieces[[i, 2 * num_devices - 1 - i]].reshape(-1) for i in range(num_devices)])
    return (np.arange(num_sections)[:, None] * (num_tokens // num_sections) + order).reshape(-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RingBatch:
    """Who owns which tokens; whole on every device of the ring.

    Attributes:
        rows: as in a batch that is not cut (flat indices, before the zig-zag).
        token_row, token_position: int32 `[T]` in zig-zag order; row -1 marks padding.
    """

    rows: RaggedRows
    token_row: jax.Array
    token_position: jax.Array


def ring_attention(
    q_TKGH: jax.Array,
    kv_TK2H: jax.Array,
    pages: Any,
    slots_T: jax.Array,
    batch: RingBatch,
    *,
    write: Callable[[Any, jax.Array, jax.Array], Any],
    axis: str,
    size: int,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Write all keys and values to this device's pages and attend its own queries.

    Args:
        q_TKGH, kv_TK2H: this device's tokens: its two pieces, one after the other.
        pages: this layer's cache, whole on every device of the ring.
        slots_T: where each token of the whole batch goes in the pages, in zig-zag order.
        batch: the whole batch.
        write: puts keys and values `[U, K, 2, H]` into the pages at their slots `[U]`.
        axis, size: mesh axis of the ring and its length.

    Returns:
        Outputs `[2U, K, G, H]` and the pages. `size - 1` collective-permutes are sent.
    """
    passing = _as_cached(kv_TK2H, pages)
    me, piece = jax.lax.axis_index(axis), q_TKGH.shape[0] // 2
    queries = _both(lambda half: _Queries.of(q_TKGH, batch, me, half, size, passing.dtype, spec))
    states = _both(lambda _: _nothing(queries.q_KXH.shape[1:3], spec.value_width or q_TKGH.shape[3]))
    forward = [(i, (i + 1) % size) for i in range(size)]
    for step in range(size):
        held, source = passing, (me - step) % size
        if step < size - 1:  # sent before it is used: a device may compute meanwhile
            passing = jax.lax.ppermute(held, axis, forward)
        keys = _both(lambda half, kv=held, at=source: _Keys.of(kv, batch, at, half, size, spec))
        states = _pass_all(queries, keys, states, spec)
        slots = jax.lax.dynamic_slice_in_dim(slots_T, source * 2 * piece, 2 * piece)
        pages = write(pages, held, slots)
    sinks = None if sinks_KG is None else jnp.tile(sinks_KG, (1, piece))

    def finished(half: tuple[_Queries, Partial]) -> jax.Array:
        q, state = half
        return q.finish(_with_sinks(_merge(state, _cached(q, pages, batch.rows, spec)), sinks))

    out = jax.lax.map(finished, (queries, states))
    return out.reshape(2 * piece, *out.shape[2:]).astype(q_TKGH.dtype), pages


def _both(make: Callable[[int], Any]) -> Any:
    """What belongs to a device's two pieces, stacked: loops over pieces keep the program small."""
    return jax.tree.map(lambda *halves: jnp.stack(halves), make(0), make(1))


def _as_cached(kv_TK2H: jax.Array, pages: Any) -> jax.Array:
    """Keys and values as the cache would give them back."""
    values, scales = split_pages(pages)
    dtype = numbers_dtype(values.dtype)
    return kv_TK2H.astype(dtype) if scales is None else dequantize(*quantize(kv_TK2H, dtype))


def _place(device: jax.Array, half: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Where the batch keeps one of a device's pieces, and which piece of the flat order it is; both in pieces."""
    return 2 * device + half, device if half == 0 else 2 * size - 1 - device


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class _Queries:
    """A piece of queries `[K, X, H]`, scaled, with the row and position of each token and the piece's number."""

    q_KXH: jax.Array
    row: jax.Array
    position: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, q_TKGH, batch: RingBatch, me, half: int, size: int, dtype, spec: AttentionSpec) -> _Queries:
        piece = q_TKGH.shape[0] // 2
        place, number = _place(me, half, size)
        q = (q_TKGH[half * piece :][:piece] * spec.scale).astype(dtype)
        q_KXH = q.transpose(1, 0, 2, 3).reshape(q.shape[1], -1, q.shape[3])
        row, position = _tokens(batch, place, piece)
        return cls(q_KXH, row, position, number)

    @property
    def group(self) -> int:
        return self.q_KXH.shape[1] // self.row.shape[0]

    def finish(self, state: Partial) -> jax.Array:
        k, x, _ = self.q_KXH.shape
        out = _finish(state, jnp.repeat(self.row >= 0, self.group))
        return out.reshape(k, x // self.group, self.group, -1).transpose(1, 0, 2, 3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class _Keys:
    """A piece of keys and values that passes, `[U, K, H]` each."""

    keys: jax.Array
    values: jax.Array
    row: jax.Array
    position: jax.Array
    number: jax.Array

    @classmethod
    def of(cls, kv_TK2H, batch: RingBatch, source, half: int, size: int, spec: AttentionSpec) -> _Keys:
        piece = kv_TK2H.shape[0] // 2
        kv_UK2H = kv_TK2H[half * piece :][:piece]
        place, number = _place(source, half, size)
        row, position = _tokens(batch, place, piece)
        return cls(kv_UK2H[:, :, 0], kv_UK2H[:, :, -1, : spec.value_width], row, position, number)


def _tokens(batch: RingBatch, place: jax.Array, piece: int) -> tuple[jax.Array, jax.Array]:
    arrays = (batch.token_row, batch.token_position)
    row, position = (jax.lax.dynamic_slice_in_dim(a, place * piece, piece) for a in arrays)
    return row, position


def _pass_all(queries: _Queries, keys: _Keys, states: Partial, spec: AttentionSpec) -> Partial:
    """Both pieces of queries to both pieces of keys that pass."""

    def pair(i: jax.Array, states: Partial) -> Partial:
        of_queries, of_keys = (
            functools.partial(jax.lax.dynamic_index_in_dim, index=j, keepdims=False) for j in (i // 2, i % 2)
        )
        q, state = jax.tree.map(of_queries, (queries, states))
        state = _pass(q, jax.tree.map(of_keys, keys), state, spec)
        return jax.tree.map(
            lambda all_of, one: jax.lax.dynamic_update_index_in_dim(all_of, one, i // 2, 0), states, state
        )

    return jax.lax.fori_loop(0, 4, pair, states)


def _pass(q: _Queries, keys: _Keys, state: Partial, spec: AttentionSpec) -> Partial:
    """Attend to a piece that passes; later pieces, and those of other rows alone, cost nothing."""
    size = min(_KEYS, keys.row.shape[0])
    q_row, q_position = (jnp.repeat(a, q.group)[:, None] for a in (q.row, q.position))

    def attend(state: Partial) -> Partial:
        for start in range(0, keys.row.shape[0], size):
            part = slice(start, start + size)
            row, position = keys.row[part], keys.position[part]
            seen = (row == q_row) & (row >= 0) & (position <= q_position)
            if spec.window is not None:
                seen &= position > q_position - spec.window
            state = _merge(state, _attend(q.q_KXH, keys.keys[part], keys.values[part], seen, spec))
        return state

    # Rows are runs of the flat order, so two pieces have one in common where their ranges of rows overlap.
    shares = (jnp.max(q.row) >= jnp.min(jnp.where(keys.row < 0, jnp.max(q.row) + 1, keys.row))) & (
        jnp.max(keys.row) >= jnp.min(jnp.where(q.row < 0, jnp.max(keys.row) + 1, q.row))
    )
    return jax.lax.cond((keys.number <= q.number) & shares, attend, lambda state: state, state)


def _attend(q_KXH: jax.Array, keys_SKH: jax.Array, values_SKH: jax.Array, seen_XS: jax.Array, spec) -> Partial:
    """Queries to some keys: maximum and sum `[K, X]`, values `[K, X, H]`, float32."""
    s_KXS = jnp.einsum("KXH,SKH->KXS", q_KXH, keys_SKH, preferred_element_type=jnp.float32)
    if spec.softcap is not None:
        s_KXS = spec.softcap * jnp.tanh(s_KXS / spec.softcap)
    s_KXS = jnp.where(seen_XS, s_KXS, _MASKED)
    top = jnp.max(s_KXS, axis=-1)
    p = jnp.where(seen_XS, jnp.exp(s_KXS - top[..., None]), 0.0)
    out = jnp.einsum("KXS,SKH->KXH", p.astype(values_SKH.dtype), values_SKH, preferred_element_type=jnp.float32)
    return top, jnp.sum(p, axis=-1), out


def _cached(q: _Queries, pages: Any, rows: RaggedRows, spec: AttentionSpec) -> Partial:
    """Attend to what each row had in the cache before this iteration: every query sees all of it (or its window).

    Tiles of queries of one row, and for each a loop over the row's blocks, as in `xla`. A tile that runs past the end
    of its row writes what the next row's own tiles overwrite.
    """
    piece, group = q.row.shape[0], q.group
    tile = min(_TILE, piece)
    begin = jnp.clip(rows.q_start - q.number * piece, 0, piece)
    count = jnp.clip(rows.q_start + rows.q_len - q.number * piece, 0, piece) - begin
    before = jnp.where(count > 0, rows.kv_len - rows.q_len, 0)
    tiles = jnp.where(before > 0, -(-count // tile), 0)
    ends = jnp.cumsum(tiles)
    blocks = _Blocks.of(pages, rows.page_table, spec, 64)
    q_pad = jnp.pad(q.q_KXH, ((0, 0), (0, tile * group), (0, 0)))
    position = jnp.pad(q.position, (0, tile))
    k, x, h = q.q_KXH.shape
    width = spec.value_width or h
    out = _nothing((k, x + tile * group), width)

    def attend_tile(i: jax.Array, out: Partial) -> Partial:
        row = jnp.sum(ends <= i)
        start = begin[row] + (i - ends[row] + tiles[row]) * tile
        q_KXH = jax.lax.dynamic_slice_in_dim(q_pad, start * group, tile * group, axis=1)
        at = jnp.repeat(jax.lax.dynamic_slice_in_dim(position, start, tile), group)[:, None]
        page_ids, length = _take(blocks.table, row), before[row]

        def attend_block(j: jax.Array, state: Partial) -> Partial:
            key = j * blocks.span + jnp.arange(blocks.span)
            seen = jnp.broadcast_to(key < length, (tile * group, blocks.span))
            if spec.window is not None:
                seen &= key > at - spec.window
            keys, values = blocks.gather(_take(page_ids, j))
            return _merge(state, _attend(q_KXH, keys, values, seen, spec))

        state = _nothing((k, tile * group), width)
        state = jax.lax.fori_loop(blocks.first(at[0, 0] + 1), -(-length // blocks.span), attend_block, state)
        mine = jnp.arange(tile * group) // group < begin[row] + count[row] - start
        state = jax.tree.map(
            lambda new, none: jnp.where(mine if new.ndim == 2 else mine[:, None], new, none),
            state,
            _nothing((k, tile * group), width),
        )
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, start * group, axis=1), out, state
        )

    out = jax.lax.fori_loop(0, ends[-1], attend_tile, out)
    return jax.tree.map(lambda a: a[:, : piece * group], out)
