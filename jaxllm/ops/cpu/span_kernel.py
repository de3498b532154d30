"""The LLVM IR of `span_attention`: one span and one key/value head at a time.

Scores of one query lie along vectors of 16 keys, so keys (and, for the derivative, values) are kept as columns too.
Products with rows sum over keys, with the head's numbers along vectors. Nothing is summed across lanes but a query's
maximum, its sum of powers and one product.

Dimension letters: S tokens of a span, K key/value heads, G query heads per key/value head, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, VECTOR, ZERO, Lanes, constant
from jaxllm.ops.cpu.lanes import DECLARATIONS as LANES

_INTS = "<16 x i32>"
_IOTA = "<" + ", ".join(f"i32 {i}" for i in range(16)) + ">"
_MASKED = -1e30
_DECLARATIONS = f"""
declare ptr @aligned_alloc(i64, i64)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare float @llvm.vector.reduce.fmax.v16f32({VECTOR})
declare float @llvm.vector.reduce.fadd.v16f32(float, {VECTOR})
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one kernel; `power_scale` is the scale of scores times log2(e): exponentials are powers of two."""

    span: int
    heads: int
    group: int
    width: int
    power_scale: float
    scale: float

    @property
    def row(self) -> int:
        """Bytes of a head's vector."""
        return 4 * self.width

    @property
    def vectors(self) -> range:
        """Byte offsets of a row's vectors."""
        return range(0, self.row, BYTES)


def kernel(shape: Shape, *, derivative: bool) -> str:
    """The whole text."""
    part = _Derivative(shape) if derivative else _Attention(shape)
    return LANES + _DECLARATIONS + part.text()


class _Span:
    """What both directions do: take operands, turn keys, make a query's weights."""

    def __init__(self, shape: Shape, operands: int, rows: int, columns: int):
        self.s, self.f = shape, Function("part", ["ptr", "i64"])
        f, s = self.f, shape
        self.lanes = Lanes(f)
        buffers, part = f.args
        self.operands = [f.load("ptr", f.at(buffers, 8 * i), 8) for i in range(operands)]
        self.qkv, self.cos, self.sin, documents = self.operands[:4]
        self.head = f.arithmetic("urem", part, s.heads)
        self.first = f.mul(f.arithmetic("udiv", part, s.heads), s.span)
        self.documents = f.at(documents, f.mul(self.first, 4))
        matrix = s.row * s.span
        sizes = [matrix] * (rows + columns) + [4 * s.span] * 2 + [s.row] * 2
        self.block = f.let(f"call ptr @aligned_alloc(i64 {BYTES}, i64 {sum(sizes)})")
        places = [f.at(self.block, sum(sizes[:i])) for i in range(len(sizes))]
        self.matrices, (self.weights, self.slopes, self.query, self.spare) = places[:-4], places[-4:]

    def place(self, base: str, t: Value, member: Value, members: int) -> str:
        """A head's vector of a token, in an array `[T, K, members, H]`."""
        f, s = self.f, self.s
        index = f.add(f.mul(f.add(self.first, t), s.heads), self.head)
        return f.at(base, f.mul(f.add(f.mul(index, members), member), s.row))

    def turn(self, source: str, target: str, t: Value, *, back: bool = False) -> None:
        """Rotate a vector by its token's angles, or back."""
        f, lanes, half = self.f, self.lanes, self.s.row // 2
        angles = f.mul(f.add(self.first, t), half)
        for c in range(0, half, BYTES):
            a, b = lanes.load(f.at(source, c)), lanes.load(f.at(source, half + c))
            cos, sin = (lanes.load(f.at(f.at(table, angles), c)) for table in (self.cos, self.sin))
            minus = lanes.sub(ZERO, sin)
            one, other = (sin, minus) if back else (minus, sin)
            lanes.store(lanes.fma(b, one, lanes.mul(a, cos)), f.at(target, c))
            lanes.store(lanes.fma(a, other, lanes.mul(b, cos)), f.at(target, half + c))

    def to_columns(self, row: str, columns: str, t: Value) -> None:
        """A vector becomes column t of a matrix `[H, S]`."""
        f = self.f
        with f.loop(0, self.s.width) as h:
            x = f.load("float", f.at(row, f.mul(h, 4)))
            f.store("float", x, f.at(columns, f.mul(f.add(f.mul(h, self.s.span), t), 4)))

    def number(self, pointer: str) -> str:
        """A number from memory in every lane."""
        return self.f.splat("float", self.f.load("float", pointer), 16)

    def blocks(self, t: Value, visit: Callable[[list[Value]], None]) -> None:
        """Calls visit with byte offsets of vectors of keys, until all up to t are seen."""
        f, together = self.f, math.gcd(self.s.span // 16, 4)
        with f.loop(0, f.add(f.mul(t, 4), 4), BYTES * together) as at:
            visit([f.add(at, BYTES * i) for i in range(together)])

    def with_columns(self, row: str, columns: str, offsets: list[Value]) -> list[str]:
        """Products of a vector with some columns."""
        f, lanes = self.f, self.lanes
        totals = [f.variable(VECTOR, ZERO) for _ in offsets]
        with f.loop(0, self.s.width) as h:
            x, line = self.number(f.at(row, f.mul(h, 4))), f.at(columns, f.mul(h, 4 * self.s.span))
            for total, offset in zip(totals, offsets, strict=True):
                total.set(lanes.fma(x, lanes.load(f.at(line, offset)), total.get()))
        return [total.get() for total in totals]

    def make_weights(self, t: Value) -> str:
        """Powers of two of a query's scores, its largest being one, into `weights`; one over their sum, in every lane.

        Keys that the query does not see get next to nothing: 2^-126.
        """
        f, lanes = self.f, self.lanes
        mine = f.splat("i32", f.load("i32", f.at(self.documents, f.mul(t, 4))), 16)
        until = f.splat("i32", f.let(f"trunc i64 {t} to i32"), 16)
        top, total = f.variable(VECTOR, constant(_MASKED)), f.variable(VECTOR, ZERO)

        def score(offsets: list[Value]) -> None:
            for x, at in zip(self.with_columns(self.query, self.matrices[0], offsets), offsets, strict=True):
                first = f.splat("i32", f.let(f"trunc i64 {f.let(f'lshr i64 {at}, 2')} to i32"), 16)
                before = f.let(f"icmp sle {_INTS} {f.let(f'add {_INTS} {first}, {_IOTA}')}, {until}")
                same = f.let(f"icmp eq {_INTS} {f.load(_INTS, f.at(self.documents, at))}, {mine}")
                seen = f.let(f"and <16 x i1> {before}, {same}")
                x = lanes.select(seen, lanes.mul(x, constant(self.s.power_scale)), constant(_MASKED))
                lanes.store(x, f.at(self.weights, at))
                top.set(lanes.maximum(top.get(), x))

        self.blocks(t, score)
        highest = f.let(f"call float @llvm.vector.reduce.fmax.v16f32({VECTOR} {top.get()})")
        highest = f.splat("float", highest, 16)

        def power(offsets: list[Value]) -> None:
            for at in offsets:
                y = lanes.power(lanes.sub(lanes.load(f.at(self.weights, at)), highest))
                lanes.store(y, f.at(self.weights, at))
                total.set(lanes.add(total.get(), y))

        self.blocks(t, power)
        return lanes.div(constant(1.0), self.across(total.get()))

    def across(self, x: str) -> str:
        """The sum of the lanes, in every lane."""
        call = f"call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {VECTOR} {x})"
        return self.f.splat("float", self.f.let(call), 16)

    def weighted_rows(self, weights: str, row_of: Callable[[Value], str], t: Value, factor: str, target: str) -> None:
        """`factor` times the sum over keys up to t of weight times row."""
        f, lanes, s = self.f, self.lanes, self.s
        together = max(1, 4 // len(s.vectors))  # enough sums that none waits for itself; a span is a multiple of 16
        totals = {(j, v): f.variable(VECTOR, ZERO) for j in range(together) for v in s.vectors}
        with f.loop(0, f.add(t, 1), together) as first:
            for j in range(together):
                row, weight = row_of(f.add(first, j)), self.number(f.at(weights, f.mul(f.add(first, j), 4)))
                for v in s.vectors:
                    totals[j, v].set(lanes.fma(weight, lanes.load(f.at(row, v)), totals[j, v].get()))
        for v in s.vectors:
            x = totals[0, v].get()
            for j in range(1, together):
                x = lanes.add(x, totals[j, v].get())
            lanes.store(lanes.mul(x, factor), f.at(target, v))


class _Attention(_Span):
    """Operands: projections, cos, sin, documents, out."""

    def __init__(self, shape: Shape):
        super().__init__(shape, 5, 0, 1)

    def text(self) -> str:
        f, s = self.f, self.s
        members = s.group + 2
        with f.loop(0, s.span) as t:
            self.turn(self.place(self.qkv, t, s.group, members), self.spare, t)
            self.to_columns(self.spare, self.matrices[0], t)
        with f.loop(0, s.span) as t, f.loop(0, s.group) as member:
            self.turn(self.place(self.qkv, t, member, members), self.query, t)
            share = self.make_weights(t)
            target = self.place(self.operands[4], t, member, s.group)
            self.weighted_rows(self.weights, lambda j: self.place(self.qkv, j, s.group + 1, members), t, share, target)
        f.do(f"call void @free(ptr {self.block})")
        return f.text()


class _Derivative(_Span):
    """Operands: projections, cos, sin, documents, the change of the outputs, out: the change of the projections.

    With weights `p` and `dp = do v`: `dv = p do`, `ds = p (dp - sum(p dp))`, `dq = ds k` and `dk = ds q`.
    """

    def __init__(self, shape: Shape):
        super().__init__(shape, 6, 3, 2)
        self.keys, self.values, self.key_rows, self.key_change, self.value_change = self.matrices

    def text(self) -> str:
        f, s = self.f, self.s
        members, out = s.group + 2, self.operands[5]
        with f.loop(0, s.span) as t:
            row = f.at(self.key_rows, f.mul(t, s.row))
            self.turn(self.place(self.qkv, t, s.group, members), row, t)
            self.to_columns(row, self.keys, t)
            self.to_columns(self.place(self.qkv, t, s.group + 1, members), self.values, t)
        changes = 2 * s.row * s.span  # the two lie side by side
        f.do(f"call void @llvm.memset.p0.i64(ptr {self.key_change}, i8 0, i64 {changes}, i1 false)")
        with f.loop(0, s.span) as t, f.loop(0, s.group) as member:
            self.turn(self.place(self.qkv, t, member, members), self.query, t)
            change = self.place(self.operands[4], t, member, s.group)
            self.make_slopes(t, self.make_weights(t), change)
            one = constant(1.0)
            self.weighted_rows(self.slopes, lambda j: f.at(self.key_rows, f.mul(j, s.row)), t, one, self.spare)
            self.turn(self.spare, self.place(out, t, member, members), t, back=True)
            self.spread(t, change)
        with f.loop(0, s.span) as t:
            at = f.mul(t, s.row)
            self.turn(f.at(self.key_change, at), self.place(out, t, s.group, members), t, back=True)
            target = self.place(out, t, s.group + 1, members)
            for v in s.vectors:
                self.lanes.store(self.lanes.load(f.at(f.at(self.value_change, at), v)), f.at(target, v))
        f.do(f"call void @free(ptr {self.block})")
        return f.text()

    def make_slopes(self, t: Value, share: str, change: str) -> None:
        """Normalise the weights; the changes of the scores, times their scale, into `slopes`."""
        f, lanes = self.f, self.lanes
        total = f.variable(VECTOR, ZERO)

        def change_of_weights(offsets: list[Value]) -> None:
            for x, at in zip(self.with_columns(change, self.values, offsets), offsets, strict=True):
                weight = lanes.mul(lanes.load(f.at(self.weights, at)), share)
                lanes.store(weight, f.at(self.weights, at))
                lanes.store(x, f.at(self.slopes, at))
                total.set(lanes.fma(weight, x, total.get()))

        self.blocks(t, change_of_weights)
        mean = self.across(total.get())

        def slope(offsets: list[Value]) -> None:
            for at in offsets:
                weight = lanes.mul(lanes.load(f.at(self.weights, at)), constant(self.s.scale))
                x = lanes.sub(lanes.load(f.at(self.slopes, at)), mean)
                lanes.store(lanes.mul(weight, x), f.at(self.slopes, at))

        self.blocks(t, slope)

    def spread(self, t: Value, change: str) -> None:
        """Add a query's part to the changes of keys and values up to t."""
        f, lanes, s = self.f, self.lanes, self.s
        with f.loop(0, f.add(t, 1)) as j:
            at, number = f.mul(j, s.row), f.mul(j, 4)
            slope, weight = self.number(f.at(self.slopes, number)), self.number(f.at(self.weights, number))
            for v in s.vectors:
                for factor, row, matrix in ((slope, self.query, self.key_change), (weight, change, self.value_change)):
                    target = f.at(f.at(matrix, at), v)
                    lanes.store(lanes.fma(factor, lanes.load(f.at(row, v)), lanes.load(target)), target)
