"""Ragged paged attention for CPUs: a kernel of vectors whose lanes are (query, head of its group) pairs, or keys.

Flat queries, pages, rows -> flat outputs, equal to `xla.ragged_paged_attention`. A part of the work is one key/value
head and up to 64 such pairs of one row (`tile.py`): a prompt's queries lie along vectors (`query_lanes.py`); where they
are few, the keys do (`key_lanes.py`). Rows of one query each are cut by their contexts instead, all heads together
(`key_segments.py`). Each pair's arithmetic is the same either way and whatever is
beside it: a query's result does not depend on the batch or on how its prompt was cut.

Dimension letters: T tokens, R rows, K key/value heads, G query heads per key/value head, H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.kv import numbers_dtype, split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows
from jaxllm.ops.cpu import ffi, key_lanes, key_segments, lanes, query_lanes, tile
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.tile import Sizes

_LANES = 64  # of a tile
_DTYPES = {"float32": "float", "bfloat16": "i16", "int8": "i8"}  # what a number in the cache is to LLVM


def unsupported(pages: Any, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot take a layer, or None."""
    values, _ = split_pages(pages)
    if values.ndim != 5:
        return "its pages are interleaved"
    dtype = numbers_dtype(values.dtype).name
    if dtype not in _DTYPES:
        return f"it reads no {dtype} cache"
    width = values.shape[-1]
    if width % 4 or (spec.value_width or width) % 4:
        return f"heads of {width} are not a multiple of 4 wide"
    return None


def attention(
    q: jax.Array,
    pages: Any,
    rows: RaggedRows | SingleRows,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
) -> jax.Array:
    """See `jaxllm.ops.attention.attention`."""
    values, scales = split_pages(pages)
    (num_tokens, num_heads, group, width), (num_rows, pages_per_row) = q.shape, rows.page_table.shape
    operands = {"q": q.astype(jnp.float32), "pages": values, "table": rows.page_table, "kv_len": rows.kv_len}
    if isinstance(rows, RaggedRows):
        operands |= {"q_start": rows.q_start, "q_len": rows.q_len}
    if scales is not None:
        operands["scales"] = scales
    if sinks_KG is not None:
        operands["sinks"] = sinks_KG.astype(jnp.float32)
    sizes = Sizes(
        heads=num_heads,
        group=group,
        width=width,
        value_width=spec.value_width or width,
        page_size=values.shape[2],
        pages_per_row=pages_per_row,
        cache=_DTYPES[numbers_dtype(values.dtype).name],
        spec=spec,
        operands=(*operands, "out"),
    )
    shape = (num_tokens, num_heads, group, sizes.value_width)
    if isinstance(rows, RaggedRows):
        part, num_parts = _part_of_chunks(sizes, num_rows, num_tokens)
    elif group <= key_lanes.MOST:
        return _over_segments(sizes, operands, num_rows, shape).astype(q.dtype)
    else:
        part, num_parts = _part_of_singles(sizes, num_rows)
    tiles = key_lanes.few(sizes) + query_lanes.tile(sizes, _LANES // 16)
    return _call(tiles + part, num_parts, operands, shape).astype(q.dtype)


def _over_segments(s: Sizes, operands: dict[str, jax.Array], num_rows: int, shape: tuple[int, ...]) -> jax.Array:
    """Rows of one query, by segments of their contexts that are merged afterwards."""
    last = {name: operands[name] for name in ("kv_len", "sinks") if name in operands}
    first = {name: x for name, x in operands.items() if name != "sinks"}
    s = dataclasses.replace(s, operands=(*first, "out"))
    partial_shape = (num_rows, key_segments.num_segments(s), s.heads * s.group, key_segments.partial_width(s))
    last["partial"] = _call(*key_segments.segments(s, num_rows), first, partial_shape)
    return _call(*key_segments.merge(dataclasses.replace(s, operands=(*last, "out")), num_rows), last, shape)


def _call(kernel: str, num_parts: int, operands: dict[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
    name = ffi.register(lanes.DECLARATIONS + tile.DECLARATIONS + kernel, num_parts, len(operands))
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))(*operands.values())


def _part_of_singles(s: Sizes, num_rows: int) -> tuple[str, int]:
    """Rows of one query: every part is a head, a row and (of a wide group) some of its lanes."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    tiles = -(-s.group // _LANES)
    index, head = f.arithmetic("udiv", part, s.heads), f.arithmetic("urem", part, s.heads)
    row, first = f.arithmetic("udiv", index, tiles), f.mul(f.arithmetic("urem", index, tiles), _LANES)
    _run_tile(f, s, buffers, row, head, first, q_start=row, q_len=1)
    return f.text(), num_rows * tiles * s.heads


def _part_of_chunks(s: Sizes, num_rows: int, num_tokens: int) -> tuple[str, int]:
    """Rows of any length: a part finds its tile by counting; parts beyond the last tile have nothing to do.

    The very last part clears what belongs to no row.
    """
    num_parts = (num_rows + num_tokens * s.group // _LANES) * s.heads + 1
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    index, head = f.arithmetic("udiv", part, s.heads), f.arithmetic("urem", part, s.heads)

    def int_of(name: str, row: Value) -> str:
        return f.load_index(f.at(_operand(f, s, buffers, name), f.mul(row, 4)))

    before = f.variable("i64", "0")
    with f.loop(0, num_rows) as row:
        q_len, nth = int_of("q_len", row), f.sub(index, before.get())
        tiles = f.arithmetic("udiv", f.add(f.mul(q_len, s.group), _LANES - 1), _LANES)
        reached, left = f.let(f"icmp sge i64 {nth}, 0"), f.let(f"icmp slt i64 {nth}, {tiles}")
        with f.when(f.let(f"and i1 {reached}, {left}")):
            _run_tile(f, s, buffers, row, head, f.mul(nth, _LANES), q_start=int_of("q_start", row), q_len=q_len)
        before.set(str(f.add(before.get(), tiles)))
    with f.when(f.let(f"icmp eq i64 {part}, {num_parts - 1}")):
        _clear_unowned(f, s, _operand(f, s, buffers, "out"), int_of, num_rows, num_tokens)
    return f.text(), num_parts


def _run_tile(
    f: Function, s: Sizes, buffers: str, row: Value, head: Value, first: Value, *, q_start: Value, q_len: Value
) -> None:
    """With keys as lanes where its queries are few."""
    num_lanes = f.smaller(f.sub(f.mul(q_len, s.group), first), _LANES)
    few = f.let(f"icmp sle i64 {num_lanes}, {key_lanes.MOST}")
    arguments = ", ".join(f"i64 {x}" for x in (row, head, first, num_lanes, q_start, q_len))
    for condition, name in ((few, "few"), (f.let(f"xor i1 {few}, true"), f"tile{_LANES // 16}")):
        with f.when(condition):
            f.do(f"call void @{name}(ptr {buffers}, {arguments})")


def _operand(f: Function, s: Sizes, buffers: str, name: str) -> str:
    return f.load("ptr", f.at(buffers, 8 * s.operands.index(name)), 8)


def _clear_unowned(
    f: Function, s: Sizes, out: str, int_of: Callable[[str, Value], Value], num_rows: int, num_tokens: int
) -> None:
    """Zeros for the queries before, between and after the rows."""
    size = 4 * s.heads * s.group * s.value_width

    def clear(first: Value, end: Value) -> None:
        target, num_bytes = f.at(out, f.mul(first, size)), f.mul(f.sub(end, first), size)
        f.do(f"call void @llvm.memset.p0.i64(ptr {target}, i8 0, i64 {num_bytes}, i1 false)")

    cursor = f.variable("i64", "0")
    with f.loop(0, num_rows) as row:
        count, start = int_of("q_len", row), int_of("q_start", row)
        with f.when(f.let(f"icmp sgt i64 {count}, 0")):
            clear(cursor.get(), start)
            cursor.set(str(f.add(start, count)))
    clear(cursor.get(), num_tokens)
