"""The inside of the CPU attention kernel: one key/value head and up to 64 lanes of one row.

Sizes -> LLVM IR of `@tile{L}(ptr buffers, i64 row, head, first lane, number of lanes, first query, number of queries)`.
Keys and values come 64 at a time into a buffer, as float32; a score is a sum of products with broadcast numbers of the
key, so nothing is summed across lanes. The softmax is online (Milakov & Gimelshein 2018), in powers of two.

Dimension letters: L vectors of 16 lanes, S keys of a block, H head width, C tokens per page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.ops.attention.metadata import AttentionSpec
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO, Lanes, constant, literal

KEYS = 64  # of a block
_MASKED = constant(-1e30)  # finite: differences of two masked scores must not be NaN
_LOG2E = math.log2(math.e)
_INTS = "<16 x i32>"
_SIZE = {"float": 4, "i16": 2, "i8": 1}
DECLARATIONS = """
declare ptr @aligned_alloc(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Everything static of one kernel.

    Attributes:
        width, value_width: of a key and of a value.
        cache: LLVM's type of a number in the cache: "float", "i16" (bfloat16) or "i8" (int8 with scales).
        operands: names of the buffers in order; the result is the last.
    """

    heads: int
    group: int
    width: int
    value_width: int
    page_size: int
    pages_per_row: int
    cache: str
    spec: AttentionSpec
    operands: tuple[str, ...]

    @property
    def halves(self) -> int:
        """1 where one row of the cache is both key and value."""
        return 1 if self.spec.value_width else 2


def products(name: str, vectors: int, count: int, stride: int, step: int, *, is_sum: bool) -> str:
    """`out[i] = sum_j a[i * stride + j * step] * b[j]` for `count` i, where b and out are rows of lanes.

    With `is_sum` the old `out`, times the vectors at the last argument, is added. Arguments: a, b, out, number of j,
    factors. All sums stay in registers.
    """
    f = Function(name, ["ptr", "ptr", "ptr", "i64", "ptr"], "noinline")
    lanes, (a, b, out, length, factors) = Lanes(f), f.args
    places = [(i, v) for i in range(count) for v in range(vectors)]
    at = {(i, v): f.at(out, (i * vectors + v) * BYTES) for i, v in places}
    factor = [lanes.load(f.at(factors, BYTES * v)) for v in range(vectors)] if is_sum else []
    sums = {
        (i, v): f.variable(VECTOR, lanes.mul(lanes.load(at[i, v]), factor[v]) if is_sum else ZERO) for i, v in places
    }
    with f.loop(0, length) as j:
        row = f.at(b, f.mul(j, BYTES * vectors))
        right = [lanes.load(f.at(row, BYTES * v)) for v in range(vectors)]
        column = f.at(a, f.mul(j, 4 * step))
        for i in range(count):
            left = f.splat("float", f.load("float", f.at(column, 4 * stride * i)), 16)
            for v in range(vectors):
                sums[i, v].set(lanes.fma(left, right[v], sums[i, v].get()))
    for place in places:
        lanes.store(sums[place].get(), at[place])
    return f.text()


def tile(s: Sizes, vectors: int) -> str:
    """The function and the two products that it calls."""
    keys = 16 if vectors == 1 else 4  # so that the sums of one call fill half of the registers
    dims = math.gcd(s.value_width, keys)
    value_row = s.width if s.halves == 1 else s.value_width
    return (
        products(f"scores{vectors}", vectors, keys, s.width, 1, is_sum=False)
        + products(f"weighted{vectors}", vectors, dims, 1, value_row, is_sum=True)
        + _Tile(s, vectors, keys, dims).text()
    )


class _Tile:
    """Writes `@tile{L}`: queries in, blocks of keys, results out."""

    def __init__(self, s: Sizes, vectors: int, keys: int, dims: int):
        self.s, self.vectors, self.keys, self.dims = s, vectors, keys, dims
        self.f = f = Function(f"tile{vectors}", ["ptr", *["i64"] * 6], "noinline")
        self.lanes = Lanes(f)
        self.buffers, self.row, self.head, self.first, self.num_lanes, self.q_start, self.q_len = f.args
        self.stride = BYTES * vectors  # of a row of lanes

    def text(self) -> str:
        """The definition."""
        f, s = self.f, self.s
        self._allocate()
        self.kv_len = f.load_index(f.at(self._operand("kv_len"), f.mul(self.row, 4)))
        self.before = f.sub(self.kv_len, self.q_len)  # position of the row's first query
        self._each_lane(self._take_query)
        self.positions = [f.load(_INTS, f.at(self.position_at, BYTES * v), BYTES) for v in range(self.vectors)]
        self.maxima = [f.variable(VECTOR, _MASKED) for _ in range(self.vectors)]
        self.totals = [f.variable(VECTOR, ZERO) for _ in range(self.vectors)]
        self.pages, self.table = (
            self._operand("pages"),
            f.at(self._operand("table"), f.mul(self.row, 4 * s.pages_per_row)),
        )
        start, self._end = self._keys_seen()
        with f.loop(start, self._end, KEYS) as first_key:
            self._attend_block(first_key)
        for v in range(self.vectors):
            self._finish(v)
        self._each_lane(self._give_result)
        f.do(f"call void @free(ptr {self.block})")
        return f.text()

    def _operand(self, name: str) -> str:
        return self.f.load("ptr", self.f.at(self.buffers, 8 * self.s.operands.index(name)), 8)

    def _allocate(self) -> None:
        """One block of memory for everything; lanes beyond the last see no key and give nothing."""
        f, s = self.f, self.s
        sizes = [s.width * self.stride, s.value_width * self.stride]  # queries, results
        sizes += [4 * KEYS * s.width, 4 * KEYS * s.value_width, KEYS * self.stride]  # keys, values, scores
        sizes += [self.stride] * 3  # positions, sinks, factors
        self.block = f.let(f"call ptr @aligned_alloc(i64 {BYTES}, i64 {sum(sizes)})")
        places = [f.at(self.block, sum(sizes[:i])) for i in range(len(sizes))]
        self.query_at, self.out_at, self.key_at, self.value_at, self.score_at = places[:5]
        self.position_at, self.sink_at, self.factor_at = places[5:]
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.block}, i8 0, i64 {sizes[0] + sizes[1]}, i1 false)")
        for v in range(self.vectors):
            f.store(_INTS, "splat (i32 -1)", f.at(self.position_at, BYTES * v), BYTES)
            self.lanes.store(_MASKED, f.at(self.sink_at, BYTES * v))

    def _each_lane(self, visit: Callable[[Value, Value, Value, Value], None]) -> None:
        """Calls visit(lane, the row's query, member of the group, place among all queries' heads)."""
        f, s = self.f, self.s
        with f.loop(0, self.num_lanes) as lane:
            index = f.add(self.first, lane)
            query, member = f.arithmetic("udiv", index, s.group), f.arithmetic("urem", index, s.group)
            token_head = f.add(f.mul(f.add(self.q_start, query), s.heads), self.head)
            visit(lane, query, member, f.add(f.mul(token_head, s.group), member))

    def _take_query(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        """A query becomes a column; its scores are in powers of two where no soft-cap comes between."""
        f, s = self.f, self.s
        source = f.at(self._operand("q"), f.mul(place, 4 * s.width))
        factor = literal(s.spec.scale / s.spec.softcap if s.spec.softcap else s.spec.scale * _LOG2E)
        with f.loop(0, s.width) as h:
            x = f.let(f"fmul float {f.load('float', f.at(source, f.mul(h, 4)))}, {factor}")
            f.store("float", x, f.at(self.query_at, f.add(f.mul(h, self.stride), f.mul(lane, 4))))
        position = f.let(f"trunc i64 {f.add(self.before, query)} to i32")
        f.store("i32", position, f.at(self.position_at, f.mul(lane, 4)))
        if "sinks" in s.operands:
            index = f.add(f.mul(self.head, s.group), member)
            sink = f.load("float", f.at(self._operand("sinks"), f.mul(index, 4)))
            f.store("float", f.let(f"fmul float {sink}, {literal(_LOG2E)}"), f.at(self.sink_at, f.mul(lane, 4)))

    def _keys_seen(self) -> tuple[Value, Value]:
        """First (a multiple of a block) and end of the keys that some lane sees."""
        f, group, window = self.f, self.s.group, self.s.spec.window
        last = f.arithmetic("udiv", f.add(self.first, f.sub(self.num_lanes, 1)), group)
        end = f.smaller(f.add(f.add(self.before, last), 1), self.kv_len)
        if window is None:
            return 0, end
        lowest = f.add(self.before, f.arithmetic("udiv", self.first, group))
        start = f.larger(f.sub(lowest, window - 1), 0)
        return f.mul(f.arithmetic("udiv", start, KEYS), KEYS), end

    def _attend_block(self, first_key: Value) -> None:
        f, s, stride = self.f, self.s, self.stride
        num_keys = f.smaller(f.sub(self._end, first_key), KEYS)
        with f.loop(0, num_keys) as c:
            self._fetch(f.add(first_key, c), c)
        with f.loop(0, num_keys, self.keys) as c:
            key, score = f.at(self.key_at, f.mul(c, 4 * s.width)), f.at(self.score_at, f.mul(c, stride))
            f.do(
                f"call void @scores{self.vectors}(ptr {key}, ptr {self.query_at}, ptr {score}, i64 {s.width}, ptr null)"
            )
        tops = self._mask(first_key, num_keys)
        for v in range(self.vectors):
            factor = self._fade(v, tops[v])
            self.lanes.store(factor, f.at(self.factor_at, BYTES * v))
            self.totals[v].set(self.lanes.mul(self.totals[v].get(), factor))
        self._exponentials(num_keys)
        values = self.value_at if s.halves == 2 else self.key_at
        with f.loop(0, s.value_width, self.dims) as h:
            value, out = f.at(values, f.mul(h, 4)), f.at(self.out_at, f.mul(h, stride))
            listed = f"ptr {value}, ptr {self.score_at}, ptr {out}, i64 {num_keys}, ptr {self.factor_at}"
            f.do(f"call void @weighted{self.vectors}({listed})")

    def _fade(self, v: int, top: str) -> str:
        """Raise the maximum; what earlier terms are to be multiplied with."""
        factor = self.lanes.power(self.lanes.sub(self.maxima[v].get(), top))
        self.maxima[v].set(top)
        return factor

    def _mask(self, first_key: Value, num_keys: Value) -> list[str]:
        """Hide what a lane does not see; the new maxima."""
        f, lanes, spec = self.f, self.lanes, self.s.spec
        tops = [f.variable(VECTOR, maximum.get()) for maximum in self.maxima]
        with f.loop(0, num_keys) as c:
            key = f.splat("i32", f.let(f"trunc i64 {f.add(first_key, c)} to i32"), 16)
            for v in range(self.vectors):
                slot = f.at(self.score_at, f.add(f.mul(c, self.stride), BYTES * v))
                x = lanes.load(slot)
                if spec.softcap:
                    x = lanes.mul(lanes.tanh(x), constant(spec.softcap * _LOG2E))
                sees = f.let(f"icmp sle {_INTS} {key}, {self.positions[v]}")
                if spec.window is not None:
                    edge = f.let(f"sub {_INTS} {self.positions[v]}, splat (i32 {spec.window})")
                    near = f.let(f"icmp sgt {_INTS} {key}, {edge}")
                    sees = f.let(f"and <16 x i1> {sees}, {near}")
                x = lanes.select(sees, x, _MASKED)
                lanes.store(x, slot)
                tops[v].set(lanes.maximum(tops[v].get(), x))
        return [top.get() for top in tops]

    def _exponentials(self, num_keys: Value) -> None:
        f, lanes = self.f, self.lanes
        with f.loop(0, num_keys) as c:
            for v in range(self.vectors):
                slot = f.at(self.score_at, f.add(f.mul(c, self.stride), BYTES * v))
                x = lanes.load(slot)
                y = lanes.power(lanes.sub(x, self.maxima[v].get()))
                y = lanes.select(lanes.equal(x, _MASKED), ZERO, y)
                lanes.store(y, slot)
                self.totals[v].set(lanes.add(self.totals[v].get(), y))

    def _finish(self, v: int) -> None:
        """What the weighted sums are to be multiplied with: 0 where nothing was seen."""
        f, lanes, total = self.f, self.lanes, self.totals[v].get()
        scale = constant(1.0)
        if "sinks" in self.s.operands:
            sink = lanes.load(f.at(self.sink_at, BYTES * v))
            top = lanes.maximum(self.maxima[v].get(), sink)
            scale = self._fade(v, top)
            total = lanes.add(lanes.mul(total, scale), lanes.power(lanes.sub(sink, top)))
        scale = lanes.select(lanes.equal(total, ZERO), ZERO, lanes.div(scale, total))
        lanes.store(scale, f.at(self.factor_at, BYTES * v))

    def _give_result(self, lane: Value, query: Value, member: Value, place: Value) -> None:
        f, width = self.f, self.s.value_width
        target = f.at(self._operand("out"), f.mul(place, 4 * width))
        scale = f.load("float", f.at(self.factor_at, f.mul(lane, 4)))
        with f.loop(0, width) as h:
            x = f.load("float", f.at(self.out_at, f.add(f.mul(h, self.stride), f.mul(lane, 4))))
            f.store("float", f.let(f"fmul float {x}, {scale}"), f.at(target, f.mul(h, 4)))

    def _fetch(self, position: Value, c: Value) -> None:
        """One token's key, and its value where that is another row, from its page into the buffers."""
        f, s = self.f, self.s
        page = f.load_index(f.at(self.table, f.mul(f.arithmetic("udiv", position, s.page_size), 4)))
        offset = f.arithmetic("urem", position, s.page_size)
        for half, place in enumerate((self.key_at, self.value_at)[: s.halves]):
            token = f.add(f.mul(f.add(f.mul(page, s.halves), half), s.page_size), offset)
            index = f.add(f.mul(token, s.heads), self.head)
            source = f.at(self.pages, f.mul(index, _SIZE[s.cache] * s.width))
            scale = f.at(self._operand("scales"), f.mul(index, 2)) if s.cache == "i8" else None
            _copy_as_float(f, s.cache, source, f.at(place, f.mul(c, 4 * s.width)), s.width, scale)


def _copy_as_float(f: Function, kind: str, source: str, target: str, width: int, scale_at: str | None) -> None:
    """Numbers of the cache, times their scale where they have one."""
    count = math.gcd(width, 16)
    floats = f"<{count} x float>"
    scales = scale_at and f.splat("float", _widened(f, "i32", "float", f.load("i16", scale_at, 2)), count)
    for i in range(0, width, count):
        x = f.load(f"<{count} x {kind}>", f.at(source, i * _SIZE[kind]), _SIZE[kind])
        if kind == "i16":
            x = _widened(f, f"<{count} x i32>", floats, x)
        elif kind == "i8":
            x = f.let(f"fmul {floats} {f.let(f'sitofp <{count} x i8> {x} to {floats}')}, {scales}")
        f.store(floats, x, f.at(target, 4 * i))


def _widened(f: Function, integer: str, number: str, bits: str) -> str:
    """bfloat16 -> float32: its bits are the upper half."""
    sixteen = "splat (i32 16)" if integer.startswith("<") else "16"
    wide = f.let(f"zext {integer.replace('i32', 'i16')} {bits} to {integer}")
    return f.let(f"bitcast {integer} {f.let(f'shl {integer} {wide}, {sixteen}')} to {number}")
