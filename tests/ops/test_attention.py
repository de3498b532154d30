"""Ragged paged attention equals a dense float64 softmax over each row's own keys, whatever the pages hold besides.

Dimension letters: T tokens, R rows, K key/value heads, G query heads per key/value head, H head width, P pages,
C tokens per page, M pages per row, L keys of one row.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kv.memory import write_pages
from jaxllm.ops.attention import AttentionSpec, RaggedRows, ragged_paged_attention
from jaxllm.ops.attention.xla import single_query_attention

GARBAGE = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One set of static sizes; `tile` and `block` None means the defaults."""

    tokens: int
    rows: int
    page_size: int
    kv_heads: int
    groups: int
    width: int = 8
    longest: int = 700
    tile: int | None = None
    block: int | None = None

    @property
    def pages_per_row(self) -> int:
        return -(-self.longest // self.page_size)

    @property
    def num_pages(self) -> int:
        return 1 + self.rows * self.pages_per_row

    @property
    def scale(self) -> float:
        return self.width**-0.5

    def attention(self):
        sizes = {"query_tile": self.tile, "key_block": self.block}
        chosen = {name: size for name, size in sizes.items() if size is not None}
        return jax.jit(functools.partial(ragged_paged_attention, spec=AttentionSpec(scale=self.scale), **chosen))


SHAPES = [
    Shape(tokens=64, rows=6, page_size=8, kv_heads=2, groups=1),
    Shape(tokens=200, rows=6, page_size=16, kv_heads=3, groups=3),
    Shape(tokens=96, rows=5, page_size=32, kv_heads=1, groups=4, tile=16, block=32),
    Shape(tokens=5, rows=8, page_size=8, kv_heads=2, groups=2, longest=40),
]


@dataclass(frozen=True, slots=True)
class Batch:
    """Arguments of attention, and the keys and values that each row really has."""

    q_TKGH: np.ndarray
    pages_P2CKH: np.ndarray
    rows: RaggedRows
    kv_L2KH: list[np.ndarray]


def lay_out(rng: np.random.Generator, shape: Shape, q_len: list[int], kv_len: list[int], num_single: int) -> Batch:
    """Scatter random keys and values over random pages; every other place of the cache holds garbage."""
    s = shape
    pages = rng.choice([GARBAGE, -GARBAGE, 1.0], (s.num_pages, 2, s.page_size, s.kv_heads, s.width))
    pages = pages.astype(np.float32)
    order = rng.permutation(np.arange(1, s.num_pages)).reshape(s.rows, s.pages_per_row)
    table = rng.integers(0, s.num_pages, (s.rows, s.pages_per_row))
    kv = []
    for row, length in enumerate(kv_len):
        kv.append(rng.standard_normal((length, 2, s.kv_heads, s.width)).astype(np.float32))
        used = -(-length // s.page_size)
        table[row, :used] = order[row, :used]
        for position in range(length):
            pages[table[row, position // s.page_size], :, position % s.page_size] = kv[-1][position]
    q = rng.standard_normal((s.tokens, s.kv_heads, s.groups, s.width)).astype(np.float32)
    fill = [0] * (s.rows - len(q_len))
    starts = np.cumsum([0, *q_len])[:-1].tolist()
    ints = [np.array([*values, *fill], np.int32) for values in (starts, q_len, kv_len)]
    return Batch(q, pages, RaggedRows(*ints, np.int32(num_single), table.astype(np.int32)), kv)


def random_batch(rng: np.random.Generator, shape: Shape) -> Batch:
    """Single-query rows first, then chunks with or without a cached prefix, some of them empty; padding after."""
    num_rows = int(rng.integers(0, shape.rows + 1))
    num_single = int(rng.integers(0, min(num_rows, shape.tokens) + 1))
    room, q_len = shape.tokens - num_single, [1] * num_single
    for _ in range(num_rows - num_single):
        most = min(room, shape.longest)
        q_len.append(int(rng.choice([0, 1, most, rng.integers(0, most + 1)])) if most else 0)
        room -= q_len[-1]
    lengths = [1, 2, shape.page_size, 63, 64, 65, 128, shape.longest, int(rng.integers(1, shape.longest + 1))]
    kv_len = [max(q, min(int(rng.choice(lengths)), shape.longest)) for q in q_len]
    return lay_out(rng, shape, q_len, kv_len, num_single)


def dense(batch: Batch, scale: float) -> np.ndarray:
    """The definition, one query at a time, in float64; tokens of no row are zero."""
    out = np.zeros(batch.q_TKGH.shape)
    for start, q_len, kv in zip(batch.rows.q_start, batch.rows.q_len, batch.kv_L2KH, strict=False):
        for i in range(q_len):
            sees = len(kv) - q_len + i + 1
            keys, values = kv[:sees, 0].astype(np.float64), kv[:sees, 1].astype(np.float64)
            scores = np.einsum("KGH,LKH->KGL", batch.q_TKGH[start + i].astype(np.float64), keys) * scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[start + i] = np.einsum("KGL,LKH->KGH", weights, values)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"C{s.page_size}-K{s.kv_heads}-G{s.groups}-T{s.tokens}")
def test_any_mix_of_rows_equals_dense_attention(shape):
    attention, rng = shape.attention(), np.random.default_rng(shape.page_size)
    for _ in range(25):
        batch = random_batch(rng, shape)
        out = np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, batch.rows))
        np.testing.assert_allclose(out, dense(batch, shape.scale), atol=2e-5, rtol=0)


def test_chunks_that_end_at_and_beside_a_tile_equal_dense_attention():
    shape = SHAPES[1]  # tiles of 64 queries, blocks of 128 keys
    attention, rng = shape.attention(), np.random.default_rng(1)
    cases = [([63, 1, 64], [63, 129, 64]), ([64, 65], [64, 700]), ([1, 127, 64], [1, 255, 128]), ([200], [200])]
    for q_len, kv_len in cases:
        batch = lay_out(rng, shape, q_len, kv_len, num_single=int(q_len[0] == 1))
        out = np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, batch.rows))
        np.testing.assert_allclose(out, dense(batch, shape.scale), atol=2e-5, rtol=0)


def test_tokens_of_no_row_give_exact_zeros():
    shape = SHAPES[0]
    batch = lay_out(np.random.default_rng(2), shape, [1, 1, 7], [700, 3, 20], num_single=2)
    out = np.asarray(shape.attention()(batch.q_TKGH, batch.pages_P2CKH, batch.rows))
    assert (out[9:] == 0).all()
    assert (np.abs(out[:9]).max(axis=(1, 2, 3)) > 0).all()


def test_width_of_the_page_table_does_not_change_the_result():
    shape = SHAPES[0]
    attention, rng = shape.attention(), np.random.default_rng(3)
    batch = lay_out(rng, shape, [1, 1, 30, 9], [5, 70, 41, 9], num_single=2)
    beyond = rng.integers(0, shape.num_pages, (shape.rows, 5000), dtype=np.int32)
    wide = replace(batch.rows, page_table=np.concatenate([batch.rows.page_table, beyond], axis=1))
    out = np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, wide))
    np.testing.assert_array_equal(out, np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, batch.rows)))
    np.testing.assert_allclose(out, dense(batch, shape.scale), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("page_size", "kv_heads", "groups"), [(8, 2, 3), (32, 3, 1)])
def test_decode_rows_equal_dense_attention_and_idle_rows_give_zeros(page_size, kv_heads, groups):
    shape = Shape(tokens=20, rows=20, page_size=page_size, kv_heads=kv_heads, groups=groups, longest=300)
    attention = jax.jit(functools.partial(single_query_attention, spec=AttentionSpec(scale=shape.scale)))
    rng = np.random.default_rng(page_size)
    lengths = [rng.integers(1, 301, 20) * (rng.random(20) >= idle) for idle in (0.0, 0.3, 0.9, 1.0)]
    for kv_len in [*lengths, np.full(20, 300)]:  # the last: the pairs that fill up the work have no block of their own
        batch = lay_out(rng, shape, [int(n > 0) for n in kv_len], kv_len.tolist(), num_single=20)
        batch = replace(batch, rows=replace(batch.rows, q_start=np.arange(20, dtype=np.int32)))
        out = np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, batch.rows.kv_len, batch.rows.page_table))
        np.testing.assert_allclose(out, dense(batch, shape.scale), atol=2e-5, rtol=0)
        assert (out[kv_len == 0] == 0).all()


def test_bfloat16_cache_stays_within_its_rounding():
    shape = SHAPES[0]
    batch = lay_out(np.random.default_rng(4), shape, [1, 40], [600, 400], num_single=1)
    pages = jnp.asarray(batch.pages_P2CKH, jnp.bfloat16)
    out = np.asarray(shape.attention()(jnp.asarray(batch.q_TKGH, jnp.bfloat16), pages, batch.rows), np.float32)
    np.testing.assert_allclose(out, dense(batch, shape.scale), atol=0.03, rtol=0)


def test_write_pages_puts_keys_and_values_at_their_slots_and_touches_nothing_else():
    rng = np.random.default_rng(5)
    pages = rng.standard_normal((7, 2, 4, 3, 8)).astype(np.float32)
    kv_TK2H = rng.standard_normal((9, 3, 2, 8)).astype(np.float32)
    slots = rng.permutation(np.arange(4, 28))[:9].astype(np.int32)
    expected = pages.copy()
    for token, slot in enumerate(slots):
        expected[slot // 4, 0, slot % 4] = kv_TK2H[token, :, 0]
        expected[slot // 4, 1, slot % 4] = kv_TK2H[token, :, 1]
    np.testing.assert_array_equal(np.asarray(jax.jit(write_pages)(pages, kv_TK2H, slots)), expected)


def test_padding_written_to_page_0_leaves_the_other_pages_alone():
    rng = np.random.default_rng(6)
    pages = rng.standard_normal((7, 2, 4, 3, 8)).astype(np.float32)
    kv_TK2H = rng.standard_normal((9, 3, 2, 8)).astype(np.float32)
    written = np.asarray(jax.jit(write_pages)(pages, kv_TK2H, np.zeros(9, np.int32)))
    np.testing.assert_array_equal(written[1:], pages[1:])


def with_nan(batch: Batch, rng: np.random.Generator, bad_row: int) -> Batch:
    """NaN wherever the cache holds nobody's keys and values, and in some place of those of one row."""
    pages = np.where(np.isin(batch.pages_P2CKH, [GARBAGE, -GARBAGE, 1.0]), np.nan, batch.pages_P2CKH)
    position, page_size = int(rng.integers(len(batch.kv_L2KH[bad_row]))), pages.shape[2]
    page = batch.rows.page_table[bad_row, position // page_size]
    pages[page, int(rng.integers(2)), position % page_size] = np.nan
    return replace(batch, pages_P2CKH=pages.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"C{s.page_size}-K{s.kv_heads}-G{s.groups}-T{s.tokens}")
def test_what_is_not_finite_stays_in_its_row_and_is_not_seen_where_nobody_looks(shape):
    attention, rng = shape.attention(), np.random.default_rng(shape.page_size + 1)
    for number in range(8):
        batch = random_batch(rng, shape)
        lengths = [len(kv) * int(q > 0) for kv, q in zip(batch.kv_L2KH, batch.rows.q_len, strict=False)]
        if not any(lengths):
            continue
        bad = int(np.argmax(lengths))
        batch = replace(with_nan(batch, rng, bad))
        out, expected = np.asarray(attention(batch.q_TKGH, batch.pages_P2CKH, batch.rows)), dense(batch, shape.scale)
        start, count = batch.rows.q_start[bad], batch.rows.q_len[bad]
        assert np.isnan(out[start + count - 1]).any(), f"case {number}: the last query sees everything of its row"
        others = np.r_[0:start, start + count : len(out)]
        np.testing.assert_allclose(out[others], expected[others], atol=2e-5, rtol=0)
