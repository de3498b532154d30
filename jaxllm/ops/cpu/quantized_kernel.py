"""The product with quantised panels, as LLVM IR: codes become numbers in registers, group by group.

A group of inputs is summed with its codes' own numbers, which bfloat16 holds exactly; its scale, and its minimum times
the sum of its inputs, come in once per group, in float32: the product is that of the exact weights, where one expanded
to bfloat16 would round each of them. A pass over a panel takes some rows of x. The first turns codes into numbers as it
goes and leaves them in a buffer that the core's own cache holds; those that follow find them there. All form a row's
sums in the same order, whatever stands beside it.

Dimension letters: M rows of x, K contracted, N columns, B panels, C columns of a panel, J groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import VECTOR, ZERO, Lanes
from jaxllm.ops.cpu.quantized_numbers import INTS, Arithmetic, Codes

PANEL = 32  # columns: two vectors of sixteen float32 sums for each row of x
_HALVES = (0, 1)
_STEP = 4 * PANEL  # bytes of a word of codes, or a vector of numbers, of all columns
_UNROLLED = 32  # inputs of a group in straight code
_AHEAD = 4096  # bytes of codes to prefetch ahead where each panel is read once
_SCALE_BYTES = {"half": 2, "bfloat": 2, "float": 4}
_DECLARATIONS = f"""
declare {VECTOR} @llvm.fma.v16f32({VECTOR}, {VECTOR}, {VECTOR})
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare ptr @aligned_alloc(i64, i64)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedSizes:
    """Everything static of one kernel.

    Attributes:
        m, k, num_panels: rows of x, inputs, panels of a matrix.
        group: inputs that share a scale: a multiple of 16 that divides `k`.
        scale: LLVM's type of a scale: "half", "bfloat" or "float".
        has_minima: whether each group has a number that is added to all of its weights, of the same type.
        is_chosen: whether the matrix is one of several, by a number that comes as the last operand.
    """

    m: int
    k: int
    num_panels: int
    group: int
    codes: Codes
    scale: str
    has_minima: bool = False
    is_chosen: bool = False

    @property
    def num_groups(self) -> int:
        """J."""
        return self.k // self.group

    @property
    def code_bytes(self) -> int:
        """Of a panel."""
        return self.k * self.codes.bits // 8 * PANEL

    @property
    def scale_bytes(self) -> int:
        """Of a panel's scales, or minima."""
        return self.num_groups * PANEL * _SCALE_BYTES[self.scale]

    @property
    def num_operands(self) -> int:
        """x, codes, scales; minima; the number."""
        return 3 + self.has_minima + self.is_chosen


def quantized_kernel(s: QuantizedSizes, arithmetic: Arithmetic, num_parts: int) -> str:
    """All rows of x times some of the panels."""
    return _DECLARATIONS + arithmetic.declarations + _Kernel(s, arithmetic, num_parts).text()


class _Kernel:
    """Writes `@part` and what it calls."""

    def __init__(self, s: QuantizedSizes, arithmetic: Arithmetic, num_parts: int):
        self.s, self.a, self.num_parts = s, arithmetic, num_parts
        self.computes_sums = s.has_minima and not arithmetic.brings_facts
        num_passes = 1 if s.m <= arithmetic.most_alone else -(-s.m // arithmetic.most_rows)
        rows, larger = divmod(s.m, num_passes)  # the first `larger` passes take one row more
        self.first = rows + 1 if larger else rows  # rows of the first pass
        passes = ((rows + 1, 1, larger), (rows, max(1, larger), num_passes))
        self.others = [(count, begin, stop) for count, begin, stop in passes if begin < stop]
        self.larger = larger

    def text(self) -> str:
        """The definitions."""
        parts = [_rows(self.s, self.a, self.first, "first", turns=True, keeps=bool(self.others))]
        parts += [_rows(self.s, self.a, count, f"rows{count}", turns=False) for count, *_ in self.others]
        if self.computes_sums:
            parts.append(_group_sums(self.s, self.a))
        return "".join(parts) + self._part()

    def _part(self) -> str:
        s, f = self.s, Function("part", ["ptr", "i64"])
        buffers, part = f.args
        x, codes, *factors, y = self._operands(f, buffers)
        first = f.arithmetic("udiv", f.mul(part, s.num_panels), self.num_parts)
        end = f.arithmetic("udiv", f.mul(f.add(part, 1), s.num_panels), self.num_parts)
        turned_bytes = _STEP // self.a.inputs * s.k if self.others else 0
        sums_bytes = -(-4 * s.m * s.num_groups // 64) * 64 if self.computes_sums else 0
        scratch = f.let(f"call ptr @aligned_alloc(i64 64, i64 {turned_bytes + sums_bytes + 64})")
        facts = f.at(x, s.m * s.k) if self.a.brings_facts else f.at(scratch, turned_bytes)
        if self.computes_sums:
            f.do(f"call void @group_sums(ptr {x}, ptr {facts})")
        with f.loop(first, end) as panel:
            weights = f.at(codes, f.mul(panel, s.code_bytes))
            scales = [f.at(pointer, f.mul(panel, s.scale_bytes)) for pointer in factors]
            y_panel = f.at(y, f.mul(panel, 4 * PANEL))

            def multiply(name: str, row: Value) -> None:
                x_rows = f.at(x, f.mul(row, self.a.x_bytes * s.k))
                y_rows = f.at(y_panel, f.mul(row, 4 * PANEL * s.num_panels))
                row_facts = f.at(facts, f.mul(row, 4 * self.a.facts * s.num_groups))
                pointers = (x_rows, weights, scratch, scales[0], scales[-1], row_facts, y_rows)
                f.do(f"call void @{name}({', '.join(f'ptr {p}' for p in pointers)})")

            multiply("first", 0)
            for count, begin, stop in self.others:
                with f.loop(begin, stop) as nth:
                    multiply(f"rows{count}", f.add(f.mul(nth, count), self.larger if count < self.first else 0))
        f.do(f"call void @free(ptr {scratch})")
        return f.text()

    def _operands(self, f: Function, buffers: str) -> list[str]:
        """x, the codes, scales and minima of the matrix, the result."""
        s = self.s
        pointers = [f.load("ptr", f.at(buffers, 8 * i), 8) for i in range(s.num_operands + 1)]
        if not s.is_chosen:
            return pointers
        *matrices, chosen, y = pointers
        number = f.load_index(chosen)
        sizes = [0, s.code_bytes, *[s.scale_bytes] * (1 + s.has_minima)]
        moved = [f.at(p, f.mul(number, size * s.num_panels)) for p, size in zip(matrices, sizes, strict=True)]
        return [*moved, y]


def _rows(s: QuantizedSizes, a: Arithmetic, count: int, name: str, *, turns: bool, keeps: bool = False) -> str:
    """`count` rows of x times one panel, its codes turned into numbers, which are kept; or the numbers kept before.

    Arguments: x, codes, numbers, scales, minima, facts of groups, result.
    """
    f = Function(name, ["ptr"] * 7, "noinline")
    lanes, (x, codes, numbers, scales, minima, facts, y) = Lanes(f), f.args
    places = [(row, half) for row in range(count) for half in _HALVES]
    totals = {place: f.variable(VECTOR, ZERO) for place in places}
    with f.loop(0, s.num_groups) as group:
        group_facts = f.at(facts, f.mul(group, 4 * a.facts))
        known = [f.at(group_facts, 4 * a.facts * s.num_groups * row) for row in range(count)]
        sums = {(row, half): f.variable(a.sums, ZERO) for row, half in places}
        for (row, _), variable in sums.items():
            variable.set(a.start(f, known[row]))
        step = s.codes.per_word if turns else a.inputs  # inputs that lie side by side
        several = math.gcd(s.group, _UNROLLED)
        with f.loop(f.mul(group, s.group), f.mul(f.add(group, 1), s.group), several) as first:
            column, kept = f.at(x, f.mul(first, a.x_bytes)), f.at(numbers, f.mul(first, _STEP // a.inputs))
            at = f.at(codes, f.mul(first, _STEP // step)) if turns else kept
            for nth in range(several // step):
                vectors = _turned(f, a, f.at(at, _STEP * nth)) if turns else [_loaded(f, a, f.at(at, _STEP * nth))]
                for i, weights in enumerate(vectors):
                    for half in _HALVES if keeps else ():
                        place = _STEP * (nth * len(vectors) + i) + 64 * half
                        f.store(a.kind, weights[half], f.at(kept, place), 64)
                    offset = a.x_bytes * (step * nth + a.inputs * i)
                    for row in range(count):
                        inputs = a.same(f, f.at(column, a.x_bytes * s.k * row + offset))
                        for half in _HALVES:
                            total = sums[row, half]
                            total.set(a.add_product(f, total.get(), inputs, weights[half]))
        factors = [_factor(f, s, scales, group, half) for half in _HALVES]
        offsets = [_factor(f, s, minima, group, half) for half in _HALVES] if s.has_minima else []
        for row, half in places:
            number, scale = a.scaled(f, sums[row, half].get(), factors[half], known[row])
            total = lanes.fma(number, scale, totals[row, half].get())
            if s.has_minima:
                inputs = f.splat("float", f.load("float", f.at(known[row], 4 * (a.facts - 1))), 16)
                total = lanes.fma(inputs, offsets[half], total)
            totals[row, half].set(total)
    for (row, half), total in totals.items():
        f.store(VECTOR, total.get(), f.at(y, 4 * PANEL * s.num_panels * row + 64 * half))
    return f.text()


def _turned(f: Function, a: Arithmetic, at: str) -> list[tuple[str, ...]]:
    """Both halves' vectors of numbers from one step of codes."""
    for half in _HALVES:
        f.do(f"call void @llvm.prefetch.p0(ptr {f.at(at, _AHEAD + 64 * half)}, i32 0, i32 3, i32 1)")
    return list(zip(*(a.numbers(f, f.load(INTS, f.at(at, 64 * half), 64)) for half in _HALVES), strict=True))


def _loaded(f: Function, a: Arithmetic, at: str) -> tuple[str, ...]:
    """Both halves' numbers that were kept."""
    return tuple(a.as_numbers(f, f.load(INTS, f.at(at, 64 * half), 64)) for half in _HALVES)


def _factor(f: Function, s: QuantizedSizes, pointer: str, group: Value, half: int) -> str:
    """Sixteen columns' scales or minima of a group, as float32."""
    size = _SCALE_BYTES[s.scale]
    at = f.at(pointer, f.add(f.mul(group, PANEL * size), 16 * size * half))
    if s.scale == "float":
        return f.load(VECTOR, at, 64)
    return f.let(f"fpext <16 x {s.scale}> {f.load(f'<16 x {s.scale}>', at, 32)} to {VECTOR}")


def _group_sums(s: QuantizedSizes, a: Arithmetic) -> str:
    """Sums of each row's groups, up to four at a time. Arguments: x, result `[M, J]`."""
    f = Function("group_sums", ["ptr", "ptr"], "noinline")
    x, out = f.args
    width = math.gcd(s.m * s.num_groups, 4)
    with f.loop(0, s.m * s.num_groups, width) as index:
        at, to = f.at(x, f.mul(index, a.x_bytes * s.group)), f.at(out, f.mul(index, 4))
        partial = [_every_sixteenth(f, s, a, f.at(at, a.x_bytes * s.group * i)) for i in range(width)]
        four = _across(f, [partial[i % width] for i in range(4)])
        for i in range(width):
            f.store("float", f.let(f"extractelement <4 x float> {four}, i64 {i}"), f.at(to, 4 * i))
    return f.text()


def _every_sixteenth(f: Function, s: QuantizedSizes, a: Arithmetic, at: str) -> str:
    """A group's inputs, every sixteenth one added to the same lane."""
    total = f.variable(VECTOR, ZERO)
    total.set(ZERO)
    several = math.gcd(s.group, _UNROLLED)
    with f.loop(0, s.group, several) as first:
        for i in range(0, several, 16):
            numbers = a.sixteen(f, f.at(f.at(at, f.mul(first, a.x_bytes)), a.x_bytes * i))
            total.set(f.let(f"fadd {VECTOR} {total.get()}, {numbers}"))
    return total.get()


def _across(f: Function, vectors: Sequence[str]) -> str:
    """The sums of four vectors, as a vector of four; each always in the same order, whatever stands beside it."""
    quads = range(0, 16, 4)
    pairs = [q + i for q in quads for i in (0, 16, 1, 17)]
    ab, cd = (_folded(f, vectors[i], vectors[i + 1], pairs, 16, 2) for i in (0, 2))
    total = _folded(f, ab, cd, [q + i for q in quads for i in (0, 1, 16, 17)], 16, 2)
    for size in (16, 8):
        total = _folded(f, total, total, range(size // 2), size, size // 2)
    return total


def _folded(f: Function, a: str, b: str, lanes: Sequence[int], size: int, away: int) -> str:
    """Some lanes of two vectors of `size`, and those `away` lanes further, added."""
    parts = []
    for shift in (0, away):
        mask = ", ".join(f"i32 {lane + shift}" for lane in lanes)
        operands = f"<{size} x float> {a}, <{size} x float> {b}"
        parts.append(f.let(f"shufflevector {operands}, <{len(lanes)} x i32> <{mask}>"))
    return f.let(f"fadd <{len(lanes)} x float> {parts[0]}, {parts[1]}")
