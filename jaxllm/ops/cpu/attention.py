"""Ragged paged attention for one CPU: a kernel of vectors whose lanes are (query, head of its group) pairs.

Flat queries, pages, rows -> flat outputs, equal to `xla.ragged_paged_attention`. A part of the work is one key/value
head and up to 64 lanes of one row: a prompt's queries fill them, a decode uses a vector of 16. Keys and values come 64
at a time into a buffer, as float32; a score is a sum of products with broadcast numbers of the key, so nothing is
summed across lanes, and the softmax is online (Milakov & Gimelshein 2018), in powers of two. A lane computes the same
whatever the other lanes hold: a query's result does not depend on the batch or on how its prompt was cut.

Dimension letters: T tokens, R rows, K key/value heads, G query heads per key/value head, H head width, C tokens per
page, M pages per row, L vectors of 16 lanes, S keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.attention.kv import split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.ir import Function, Value

_LANES = 64  # of a prompt's part
_KEYS = 64  # of a block
_VECTOR = "<16 x float>"
_DECLARATIONS = f"""
declare ptr @aligned_alloc(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare {_VECTOR} @llvm.fma.v16f32({_VECTOR}, {_VECTOR}, {_VECTOR})
declare {_VECTOR} @llvm.maxnum.v16f32({_VECTOR}, {_VECTOR})
declare {_VECTOR} @llvm.copysign.v16f32({_VECTOR}, {_VECTOR})
declare {_VECTOR} @llvm.fabs.v16f32({_VECTOR})
declare {_VECTOR} @llvm.rint.v16f32({_VECTOR})
"""
_DTYPES = {"float32": "float", "bfloat16": "i16", "int8": "i8"}  # what a number in the cache is to LLVM
_BYTES = {"float": 4, "i16": 2, "i8": 1}


def unsupported(pages: Any, spec: AttentionSpec) -> str | None:
    """Why the kernel cannot take a layer, or None."""
    values, _ = split_pages(pages)
    if values.ndim != 5:
        return "its pages are interleaved"
    if values.dtype.name not in _DTYPES:
        return f"it reads no {values.dtype.name} cache"
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
    (num_tokens, num_heads, group, width), table = q.shape, rows.page_table
    is_single = isinstance(rows, SingleRows)
    shape = _Shape(
        rows=table.shape[0], tokens=num_tokens, heads=num_heads, group=group, width=width,
        value_width=spec.value_width or width, page_size=values.shape[2], pages_per_row=table.shape[1],
        cache=_DTYPES[values.dtype.name], spec=spec, is_single=is_single, has_sinks=sinks_KG is not None,
    )  # fmt: skip
    operands = [q.astype(jnp.float32), values, table, rows.kv_len]
    operands += [] if isinstance(rows, SingleRows) else [rows.q_start, rows.q_len]
    operands += [] if scales is None else [scales]
    operands += [] if sinks_KG is None else [sinks_KG.astype(jnp.float32)]
    name = ffi.register(_kernel(shape), shape.num_parts, len(operands))
    result = jax.ShapeDtypeStruct((num_tokens, num_heads, group, shape.value_width), jnp.float32)
    return jax.ffi.ffi_call(name, result)(*operands).astype(q.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Everything static of one kernel; `cache` is the LLVM type of a number in the cache."""

    rows: int
    tokens: int
    heads: int
    group: int
    width: int
    value_width: int
    page_size: int
    pages_per_row: int
    cache: str
    spec: AttentionSpec
    is_single: bool
    has_sinks: bool

    @property
    def num_parts(self) -> int:
        """Tiles of lanes that may exist, times heads, and in a flat batch one for the queries of nobody.

        Parts beyond those that do exist return at once.
        """
        if self.is_single:
            return self.rows * -(-self.group // _LANES) * self.heads
        return (self.rows + self.tokens * self.group // _LANES) * self.heads + 1

    @property
    def halves(self) -> int:
        """1 where one row of the cache is both key and value."""
        return 1 if self.spec.value_width else 2

    @property
    def value_row(self) -> int:
        """Distance of two values in their buffer."""
        return self.width if self.spec.value_width else self.value_width

    def operand(self, name: str) -> int:
        """Place among the operands; the result comes last."""
        names = ["q", "pages", "table", "kv_len"] + ([] if self.is_single else ["q_start", "q_len"])
        names += (["scales"] if self.cache == "i8" else []) + (["sinks"] if self.has_sinks else [])
        return [*names, "out"].index(name)


def _kernel(s: _Shape) -> str:
    functions = []
    for vectors in (1, _LANES // 16):
        keys = 16 if vectors == 1 else 4
        dims = math.gcd(s.value_width, keys)
        functions += [
            _products(f"scores{vectors}", vectors, keys, s.width, 1, is_sum=False),
            _products(f"weighted{vectors}", vectors, dims, 1, s.value_row, is_sum=True),
            _unit(s, vectors, keys, dims),
        ]
    return _DECLARATIONS + "".join(functions) + _part(s)


def _part(s: _Shape) -> str:
    """Which row, head and lanes a part is, or nothing."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    tile, head = f.arithmetic("udiv", part, s.heads), f.arithmetic("urem", part, s.heads)

    def int_of(name: str, row: Value) -> str:
        array = f.load("ptr", f.at(buffers, 8 * s.operand(name)), 8)
        return f.load_index(f.at(array, f.mul(row, 4)))

    def run(row: Value, q_len: Value, first: Value, start: Value) -> None:
        lanes = f.smaller(f.sub(f.mul(q_len, s.group), first), _LANES)
        few = f.let(f"icmp sle i64 {lanes}, 16")
        many = f.let(f"xor i1 {few}, true")
        for condition, vectors in ((few, 1), (many, _LANES // 16)):
            with f.when(condition):
                values = (row, head, first, lanes, start, q_len)
                f.do(f"call void @unit{vectors}(ptr {buffers}, {', '.join(f'i64 {v}' for v in values)})")

    if s.is_single:
        tiles = -(-s.group // _LANES)
        row = f.arithmetic("udiv", tile, tiles)
        run(row, 1, f.mul(f.arithmetic("urem", tile, tiles), _LANES), row)
        return f.text()
    before = f.variable("i64", "0")
    with f.loop(0, s.rows) as row:
        q_len = int_of("q_len", row)
        tiles = f.arithmetic("udiv", f.add(f.mul(q_len, s.group), _LANES - 1), _LANES)
        index = f.sub(tile, before.get())
        not_before = f.let(f"icmp sge i64 {index}, 0")
        not_after = f.let(f"icmp slt i64 {index}, {tiles}")
        with f.when(f.let(f"and i1 {not_before}, {not_after}")):
            run(row, q_len, f.mul(index, _LANES), int_of("q_start", row))
        before.set(str(f.add(before.get(), tiles)))
    with f.when(f.let(f"icmp eq i64 {part}, {s.num_parts - 1}")):
        _clear_unowned(f, s, f.load("ptr", f.at(buffers, 8 * s.operand("out")), 8), int_of)
    return f.text()


def _clear_unowned(f: Function, s: _Shape, out: str, int_of: Callable[[str, Value], Value]) -> None:
    """Zeros for the queries before, between and after the rows."""

    def clear(first: Value, end: Value) -> None:
        size = 4 * s.heads * s.group * s.value_width
        f.do(f"call void @llvm.memset.p0.i64(ptr {f.at(out, f.mul(first, size))}, i8 0, "
             f"i64 {f.mul(f.sub(end, first), size)}, i1 false)")  # fmt: skip

    cursor = f.variable("i64", "0")
    with f.loop(0, s.rows) as row:
        count, start = int_of("q_len", row), int_of("q_start", row)
        with f.when(f.let(f"icmp sgt i64 {count}, 0")):
            clear(cursor.get(), start)
            cursor.set(str(f.add(start, count)))
    clear(cursor.get(), s.tokens)


def _power(f: Function, x: str) -> str:
    """2^x for x <= 0: whole powers by the exponent's bits, the rest (within a half) by its Taylor polynomial."""
    x = f.let(f"call {_VECTOR} @llvm.maxnum.v16f32({_VECTOR} {x}, {_VECTOR} {_splat_literal(-126.0)})")
    whole = f.let(f"call {_VECTOR} @llvm.rint.v16f32({_VECTOR} {x})")
    rest = f.let(f"fsub {_VECTOR} {x}, {whole}")
    y = _splat_literal(math.log(2) ** 7 / math.factorial(7))
    for power in range(6, -1, -1):
        term = _splat_literal(math.log(2) ** power / math.factorial(power))
        y = f.let(f"call {_VECTOR} @llvm.fma.v16f32({_VECTOR} {y}, {_VECTOR} {rest}, {_VECTOR} {term})")
    bits = f.let(f"fptosi {_VECTOR} {whole} to <16 x i32>")
    bits = f.let(f"shl <16 x i32> {bits}, splat (i32 23)")
    y = f.let(f"bitcast {_VECTOR} {y} to <16 x i32>")
    y = f.let(f"add <16 x i32> {y}, {bits}")
    return f.let(f"bitcast <16 x i32> {y} to {_VECTOR}")


def _splat_literal(number: float) -> str:
    """A vector constant, in float32 (which LLVM writes as the bits of a float64)."""
    return f"splat (float {_literal(number)})"


def _literal(number: float) -> str:
    return f"0x{np.float64(np.float32(number)).view(np.uint64):016X}"


_MASKED = _splat_literal(-1e30)  # finite: differences of two masked scores must not be NaN


def _products(name: str, vectors: int, count: int, stride: int, step: int, *, is_sum: bool) -> str:
    """`out[i] = sum_j a[i * stride + j * step] * b[j]` for `count` i, where b and out are rows of lanes.

    With `is_sum` the old `out`, times the vectors at the last argument, is added. Arguments: a, b, out, number of j,
    factors.
    """
    f = Function(name, ["ptr", "ptr", "ptr", "i64", "ptr"], "noinline")
    a, b, out, length, factors = f.args
    row = 64 * vectors
    sums = {}
    for i in range(count):
        for v in range(vectors):
            initial = "zeroinitializer"
            if is_sum:
                old = f.load(_VECTOR, f.at(out, i * row + 64 * v), 64)
                initial = f.let(f"fmul {_VECTOR} {old}, {f.load(_VECTOR, f.at(factors, 64 * v), 64)}")
            sums[i, v] = f.variable(_VECTOR, initial)
    with f.loop(0, length) as j:
        lanes = [f.load(_VECTOR, f.at(f.at(b, f.mul(j, row)), 64 * v), 64) for v in range(vectors)]
        column = f.at(a, f.mul(j, 4 * step))
        for i in range(count):
            number = f.splat("float", f.load("float", f.at(column, 4 * stride * i)), 16)
            for v in range(vectors):
                total = sums[i, v].get()
                sums[i, v].set(
                    f.let(
                        f"call {_VECTOR} @llvm.fma.v16f32({_VECTOR} {number}, {_VECTOR} {lanes[v]}, {_VECTOR} {total})"
                    )
                )
    for (i, v), total in sums.items():
        f.store(_VECTOR, total.get(), f.at(out, i * row + 64 * v), 64)
    return f.text()


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Byte offsets of one part's buffers."""

    queries: int
    keys: int
    values: int
    scores: int
    out: int
    positions: int
    sinks: int
    alpha: int
    size: int

    @classmethod
    def of(cls, s: _Shape, vectors: int) -> _Scratch:
        row = 64 * vectors
        sizes = [s.width * row, 4 * _KEYS * s.width, 4 * _KEYS * s.value_width, _KEYS * row, s.value_width * row]
        sizes += [row] * 3
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // 64) * 64)
        return cls(*offsets)


def _unit(s: _Shape, vectors: int, keys: int, dims: int) -> str:
    """Attention of one key/value head and up to `16 * vectors` lanes of one row.

    Arguments: buffers, row, head, first lane, number of lanes, the row's first query, its number of queries.
    """
    f = Function(f"unit{vectors}", ["ptr", *["i64"] * 6], "noinline")
    buffers, row, head, first, num_lanes, q_start, q_len = f.args
    at, width = _Scratch.of(s, vectors), 64 * vectors

    def operand(name: str) -> str:
        return f.load("ptr", f.at(buffers, 8 * s.operand(name)), 8)

    block = f.let(f"call ptr @aligned_alloc(i64 64, i64 {at.size})")
    q, out = operand("q"), operand("out")
    kv_len = f.load_index(f.at(operand("kv_len"), f.mul(row, 4)))
    before = f.sub(kv_len, q_len)  # position of the row's first query

    # Queries: lanes in the last dim, in units of powers of two where nothing comes between score and softmax.
    factor = s.spec.scale * (1.0 if s.spec.softcap else math.log2(math.e))
    with f.loop(0, s.width * vectors) as i:
        f.store(_VECTOR, "zeroinitializer", f.at(f.at(block, at.queries), f.mul(i, 64)), 64)
    with f.loop(0, s.value_width * vectors) as i:
        f.store(_VECTOR, "zeroinitializer", f.at(f.at(block, at.out), f.mul(i, 64)), 64)
    for v in range(vectors):
        f.store("<16 x i32>", "splat (i32 -1)", f.at(block, at.positions + 64 * v), 64)
        f.store(_VECTOR, f"{_MASKED}", f.at(block, at.sinks + 64 * v), 64)

    def each_lane(visit) -> None:
        with f.loop(0, num_lanes) as lane:
            index = f.add(first, lane)
            query, member = f.arithmetic("udiv", index, s.group), f.arithmetic("urem", index, s.group)
            place = f.add(f.mul(f.add(f.mul(f.add(q_start, query), s.heads), head), s.group), member)
            visit(lane, query, member, place)

    def take(lane: Value, query: Value, member: Value, place: Value) -> None:
        source = f.at(q, f.mul(place, 4 * s.width))
        with f.loop(0, s.width) as h:
            x = f.load("float", f.at(source, f.mul(h, 4)))
            x = f.let(f"fmul float {x}, {_literal(factor)}")
            f.store("float", x, f.at(f.at(block, at.queries), f.add(f.mul(h, width), f.mul(lane, 4))))
        position = f.let(f"trunc i64 {f.add(before, query)} to i32")
        f.store("i32", position, f.at(f.at(block, at.positions), f.mul(lane, 4)))
        if s.has_sinks:
            sink = f.load("float", f.at(operand("sinks"), f.mul(f.add(f.mul(head, s.group), member), 4)))
            sink = f.let(f"fmul float {sink}, {_literal(math.log2(math.e))}")
            f.store("float", sink, f.at(f.at(block, at.sinks), f.mul(lane, 4)))

    each_lane(take)
    positions = [f.load("<16 x i32>", f.at(block, at.positions + 64 * v), 64) for v in range(vectors)]
    last = f.add(before, f.arithmetic("udiv", f.add(first, f.sub(num_lanes, 1)), s.group))
    end, start = f.smaller(f.add(last, 1), kv_len), 0
    if s.spec.window is not None:
        lowest = f.add(before, f.arithmetic("udiv", first, s.group))
        start = f.larger(f.sub(lowest, s.spec.window - 1), 0)
        start = f.mul(f.arithmetic("udiv", start, _KEYS), _KEYS)
    maxima = [f.variable(_VECTOR, f"{_MASKED}") for _ in range(vectors)]
    totals = [f.variable(_VECTOR, "zeroinitializer") for _ in range(vectors)]
    pages, table = operand("pages"), f.at(operand("table"), f.mul(row, 4 * s.pages_per_row))

    def rescale(v: int, new: str) -> str:
        return _power(f, f.let(f"fsub {_VECTOR} {maxima[v].get()}, {new}"))

    with f.loop(start, end, _KEYS) as first_key:
        num_keys = f.smaller(f.sub(end, first_key), _KEYS)
        with f.loop(0, num_keys) as c:
            _stage_row(f, s, block, at, pages, operand("scales") if s.cache == "i8" else "null", table, head,
                       f.add(first_key, c), c)  # fmt: skip
        with f.loop(0, num_keys, keys) as c:
            key, score = (
                f.at(f.at(block, at.keys), f.mul(c, 4 * s.width)),
                f.at(f.at(block, at.scores), f.mul(c, width)),
            )
            queries = f.at(block, at.queries)
            f.do(f"call void @scores{vectors}(ptr {key}, ptr {queries}, ptr {score}, i64 {s.width}, ptr null)")
        tops = [f.variable(_VECTOR, maximum.get()) for maximum in maxima]
        with f.loop(0, num_keys) as c:
            key = f.let(f"trunc i64 {f.add(first_key, c)} to i32")
            key = f.splat("i32", key, 16)
            for v in range(vectors):
                slot = f.at(f.at(block, at.scores + 64 * v), f.mul(c, width))
                x = f.load(_VECTOR, slot, 64)
                if s.spec.softcap:
                    x = _softcapped(f, x, s.spec.softcap)
                sees = f.let(f"icmp sle <16 x i32> {key}, {positions[v]}")
                if s.spec.window is not None:
                    edge = f.let(f"sub <16 x i32> {positions[v]}, splat (i32 {s.spec.window})")
                    near = f.let(f"icmp sgt <16 x i32> {key}, {edge}")
                    sees = f.let(f"and <16 x i1> {sees}, {near}")
                x = f.let(f"select <16 x i1> {sees}, {_VECTOR} {x}, {_VECTOR} {_MASKED}")
                f.store(_VECTOR, x, slot, 64)
                tops[v].set(f.let(f"call {_VECTOR} @llvm.maxnum.v16f32({_VECTOR} {tops[v].get()}, {_VECTOR} {x})"))
        for v in range(vectors):
            alpha = rescale(v, tops[v].get())
            f.store(_VECTOR, alpha, f.at(block, at.alpha + 64 * v), 64)
            totals[v].set(f.let(f"fmul {_VECTOR} {totals[v].get()}, {alpha}"))
            maxima[v].set(tops[v].get())
        with f.loop(0, num_keys) as c:
            for v in range(vectors):
                slot = f.at(f.at(block, at.scores + 64 * v), f.mul(c, width))
                x = f.load(_VECTOR, slot, 64)
                y = _power(f, f.let(f"fsub {_VECTOR} {x}, {maxima[v].get()}"))
                hidden = f.let(f"fcmp oeq {_VECTOR} {x}, {_MASKED}")
                y = f.let(f"select <16 x i1> {hidden}, {_VECTOR} zeroinitializer, {_VECTOR} {y}")
                f.store(_VECTOR, y, slot, 64)
                totals[v].set(f.let(f"fadd {_VECTOR} {totals[v].get()}, {y}"))
        values = at.values if s.halves == 2 else at.keys
        with f.loop(0, s.value_width, dims) as h:
            value, target = f.at(f.at(block, values), f.mul(h, 4)), f.at(f.at(block, at.out), f.mul(h, width))
            factors = f.at(block, at.alpha)
            listed = f"ptr {value}, ptr {f.at(block, at.scores)}, ptr {target}, i64 {num_keys}, ptr {factors}"
            f.do(f"call void @weighted{vectors}({listed})")

    for v in range(vectors):
        total, scale = totals[v].get(), "splat (float 1.0)"
        if s.has_sinks:
            sink = f.load(_VECTOR, f.at(block, at.sinks + 64 * v), 64)
            top = f.let(f"call {_VECTOR} @llvm.maxnum.v16f32({_VECTOR} {maxima[v].get()}, {_VECTOR} {sink})")
            scale = rescale(v, top)
            total = f.let(f"fmul {_VECTOR} {total}, {scale}")
            total = f.let(f"fadd {_VECTOR} {total}, {_power(f, f.let(f'fsub {_VECTOR} {sink}, {top}'))}")
        empty = f.let(f"fcmp oeq {_VECTOR} {total}, zeroinitializer")
        scale = f.let(f"fdiv {_VECTOR} {scale}, {total}")
        scale = f.let(f"select <16 x i1> {empty}, {_VECTOR} zeroinitializer, {_VECTOR} {scale}")
        f.store(_VECTOR, scale, f.at(block, at.alpha + 64 * v), 64)

    def give(lane: Value, query: Value, member: Value, place: Value) -> None:
        target = f.at(out, f.mul(place, 4 * s.value_width))
        scale = f.load("float", f.at(f.at(block, at.alpha), f.mul(lane, 4)))
        with f.loop(0, s.value_width) as h:
            x = f.load("float", f.at(f.at(block, at.out), f.add(f.mul(h, width), f.mul(lane, 4))))
            f.store("float", f.let(f"fmul float {x}, {scale}"), f.at(target, f.mul(h, 4)))

    each_lane(give)
    f.do(f"call void @free(ptr {block})")
    return f.text()


def _stage_row(f: Function, s: _Shape, block: str, at: _Scratch, pages: str, scales: str, table: str, head: Value,
               position: Value, c: Value) -> None:  # fmt: skip
    """One token's key, and its value where that is another row, into the buffers."""
    page = f.load_index(f.at(table, f.mul(f.arithmetic("udiv", position, s.page_size), 4)))
    offset = f.arithmetic("urem", position, s.page_size)
    for half, place in enumerate((at.keys, at.values)[: s.halves]):
        token = f.add(f.mul(f.add(f.mul(page, s.halves), half), s.page_size), offset)
        index = f.add(f.mul(token, s.heads), head)
        source = f.at(pages, f.mul(index, _BYTES[s.cache] * s.width))
        scale = f.at(scales, f.mul(index, 2)) if s.cache == "i8" else None
        _copy_as_float(f, s.cache, source, f.at(f.at(block, place), f.mul(c, 4 * s.width)), s.width, scale)


def _copy_as_float(f: Function, kind: str, source: str, target: str, width: int, scale_at: str | None) -> None:
    """Numbers of the cache, times their scale where they have one."""
    lanes = math.gcd(width, 16)
    scales = scale_at and f.splat("float", _widened(f, "i32", "float", f.load("i16", scale_at, 2)), lanes)
    for i in range(0, width, lanes):
        x = f.load(f"<{lanes} x {kind}>", f.at(source, i * _BYTES[kind]), _BYTES[kind])
        if kind == "i16":
            x = _widened(f, f"<{lanes} x i32>", f"<{lanes} x float>", x)
        elif kind == "i8":
            x = f.let(f"sitofp <{lanes} x i8> {x} to <{lanes} x float>")
            x = f.let(f"fmul <{lanes} x float> {x}, {scales}")
        f.store(f"<{lanes} x float>", x, f.at(target, 4 * i))


def _widened(f: Function, integer: str, number: str, bits: str) -> str:
    """bfloat16 -> float32: its bits are the upper half."""
    half = integer.replace("i32", "i16")
    sixteen = "splat (i32 16)" if integer.startswith("<") else "16"
    wide = f.let(f"zext {half} {bits} to {integer}")
    return f.let(f"bitcast {integer} {f.let(f'shl {integer} {wide}, {sixteen}')} to {number}")


def _softcapped(f: Function, x: str, cap: float) -> str:
    """`cap * tanh(x / cap)` in units of powers of two: tanh(y) = sign(y) (1 - z) / (1 + z) with z = exp(-2|y|)."""
    size = f.let(f"call {_VECTOR} @llvm.fabs.v16f32({_VECTOR} {x})")
    z = _power(f, f.let(f"fmul {_VECTOR} {size}, {_splat_literal(-2 * math.log2(math.e) / cap)}"))
    ratio = f.let(
        f"fdiv {_VECTOR} {f.let(f'fsub {_VECTOR} splat (float 1.0), {z}')}, "
        f"{f.let(f'fadd {_VECTOR} splat (float 1.0), {z}')}"
    )
    ratio = f.let(f"fmul {_VECTOR} {ratio}, {_splat_literal(cap * math.log2(math.e))}")
    return f.let(f"call {_VECTOR} @llvm.copysign.v16f32({_VECTOR} {ratio}, {_VECTOR} {x})")
