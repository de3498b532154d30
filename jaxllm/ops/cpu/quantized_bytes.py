"""Products of codes with rows of x that are rounded to 8-bit integers themselves (VPDPBUSD), as LLVM IR.

Four inputs of sixteen columns in one instruction, exact in 32 bits: twice what bfloat16 pairs do. A row of x is rounded
group by group, or as a whole: `code = round(x / scale)` with `scale = max|x| / 127`. The instruction takes codes of
weights without a sign, so `offset` is added to them, and `offset` times the sum of the row's codes is taken off at the
start.

Dimension letters: M rows of x, K contracted, J groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import VECTOR, ZERO, Lanes, constant
from jaxllm.ops.cpu.quantized_numbers import INTS, Codes

FACTS = 3  # of each row's group: what its sums start from (int32), its scale, the sum of its inputs
_DOT = "llvm.x86.avx512.vpdpbusd.512"
_BYTES_ORDER = {4: (0, 4, 1, 5, 2, 6, 3, 7), 8: (0, 1, 2, 3)}  # inputs of a word as the products meet them
_TINY = 1e-10  # a group of zeros has a scale, too


def byte_offset(codes: Codes) -> int | None:
    """What is added to a code's number so that it has no sign; None where the codes are no consecutive integers."""
    if codes.bits == 8:
        return 128
    offset = -codes.table[0]
    consecutive = codes.table == tuple(code - offset for code in range(16))
    return int(offset) if consecutive and offset == int(offset) and offset >= 0 else None


class Bytes:
    """See the module, and `jaxllm.ops.cpu.quantized_numbers.Arithmetic`; x comes from `rounding_kernel`."""

    inputs, x_bytes, kind, sums = 4, 1, INTS, INTS
    facts, brings_facts = FACTS, True
    most_alone, most_rows = 12, 6
    declarations = f"declare {INTS} @{_DOT}({INTS}, {INTS}, {INTS})\n"

    def __init__(self, codes: Codes):
        self.codes = codes

    def numbers(self, f: Function, word: str) -> list[str]:
        """See `Arithmetic`."""
        if self.codes.bits == 8:
            return [f.let(f"xor {INTS} {word}, splat (i32 {0x80808080 - (1 << 32)})")]
        high = f.let(f"lshr {INTS} {word}, splat (i32 4)")
        return [f.let(f"and {INTS} {x}, splat (i32 {0x0F0F0F0F})") for x in (word, high)]

    def as_numbers(self, f: Function, word: str) -> str:
        """See `Arithmetic`."""
        return word

    def same(self, f: Function, pointer: str) -> str:
        """See `Arithmetic`."""
        return f.splat("i32", f.load("i32", pointer), 16)

    def add_product(self, f: Function, total: str, x: str, numbers: str) -> str:
        """See `Arithmetic`."""
        return f.let(f"call {INTS} @{_DOT}({INTS} {total}, {INTS} {numbers}, {INTS} {x})")

    def start(self, f: Function, facts: str) -> str:
        """See `Arithmetic`."""
        return f.splat("i32", f.load("i32", facts), 16) if byte_offset(self.codes) else ZERO

    def scaled(self, f: Function, total: str, scale: str, facts: str) -> tuple[str, str]:
        """See `Arithmetic`."""
        of_inputs = f.splat("float", f.load("float", f.at(facts, 4)), 16)
        return f.let(f"sitofp {INTS} {total} to {VECTOR}"), Lanes(f).mul(scale, of_inputs)

    def sixteen(self, f: Function, pointer: str) -> str:
        """Never asked: sums come with x."""
        raise AssertionError("rows of 8-bit integers bring their sums")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundingSizes:
    """Everything static of a rounding.

    Attributes:
        m, k: rows of x (float32), inputs.
        group: inputs of a group of the weights.
        by_group: whether each group has a scale of its own; otherwise a row has one.
    """

    m: int
    k: int
    group: int
    by_group: bool
    codes: Codes

    @property
    def num_groups(self) -> int:
        """J."""
        return self.k // self.group

    @property
    def num_bytes(self) -> int:
        """Of the result: codes int8 `[M, K]`, facts `[M, J, 3]`."""
        return self.m * (self.k + 4 * FACTS * self.num_groups)


def rounding_kernel(s: RoundingSizes, num_parts: int) -> str:
    """Some rows' codes and facts. Buffers: x, result."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    x, out = (f.load("ptr", f.at(buffers, 8 * i), 8) for i in (0, 1))
    first = f.arithmetic("udiv", f.mul(part, s.m), num_parts)
    end = f.arithmetic("udiv", f.mul(f.add(part, 1), s.m), num_parts)
    with f.loop(first, end) as row:
        x_row, codes = f.at(x, f.mul(row, 4 * s.k)), f.at(out, f.mul(row, s.k))
        facts = f.at(out, f.add(f.mul(row, 4 * FACTS * s.num_groups), s.m * s.k))
        of_row = None if s.by_group else _scale(f, x_row, 0, s.k)
        with f.loop(0, s.num_groups) as group:
            start = f.mul(group, s.group)
            scale = of_row or _scale(f, x_row, start, s.group)
            total = _round(f, s, x_row, codes, start, scale)
            _note(f, s, f.at(facts, f.mul(group, 4 * FACTS)), total, scale)
    return _ROUNDING_DECLARATIONS + f.text()


_ROUNDING_DECLARATIONS = f"""
declare {VECTOR} @llvm.fabs.v16f32({VECTOR})
declare {VECTOR} @llvm.maxnum.v16f32({VECTOR}, {VECTOR})
declare {VECTOR} @llvm.rint.v16f32({VECTOR})
declare float @llvm.vector.reduce.fmax.v16f32({VECTOR})
declare i32 @llvm.vector.reduce.add.v16i32({INTS})
"""


def _scale(f: Function, x: str, start: Value, count: int) -> str:
    """Of inputs `start` to `start + count`, a float."""
    top = f.variable(VECTOR, constant(_TINY))
    top.set(constant(_TINY))
    with f.loop(start, f.add(start, count), 16) as i:
        numbers = f.let(f"call {VECTOR} @llvm.fabs.v16f32({VECTOR} {f.load(VECTOR, f.at(x, f.mul(i, 4)))})")
        top.set(Lanes(f).maximum(top.get(), numbers))
    largest = f.let(f"call float @llvm.vector.reduce.fmax.v16f32({VECTOR} {top.get()})")
    return f.let(f"fdiv float {largest}, 127.0")


def _round(f: Function, s: RoundingSizes, x: str, codes: str, start: Value, scale: str) -> str:
    """A group's codes into their places; their sum, an i32."""
    lanes, total = Lanes(f), f.variable(INTS, ZERO)
    total.set(ZERO)
    scales, order = f.splat("float", scale, 16), _BYTES_ORDER[s.codes.bits]
    mask = ", ".join(f"i32 {i - i % len(order) + order[i % len(order)]}" for i in range(16))
    with f.loop(start, f.add(start, s.group), 16) as i:
        x_over_scale = lanes.div(f.load(VECTOR, f.at(x, f.mul(i, 4))), scales)
        whole = f.let(f"call {VECTOR} @llvm.rint.v16f32({VECTOR} {x_over_scale})")
        ints = f.let(f"fptosi {VECTOR} {whole} to {INTS}")
        total.set(f.let(f"add {INTS} {total.get()}, {ints}"))
        small = f.let(f"trunc {INTS} {ints} to <16 x i8>")
        moved = f.let(f"shufflevector <16 x i8> {small}, <16 x i8> poison, <16 x i32> <{mask}>")
        f.store("<16 x i8>", moved, f.at(codes, i), 1)
    return f.let(f"call i32 @llvm.vector.reduce.add.v16i32({INTS} {total.get()})")


def _note(f: Function, s: RoundingSizes, facts: str, total: str, scale: str) -> None:
    f.store("i32", f.let(f"mul i32 {total}, {-(byte_offset(s.codes) or 0)}"), facts)
    f.store("float", scale, f.at(facts, 4))
    f.store("float", f.let(f"fmul float {f.let(f'sitofp i32 {total} to float')}, {scale}"), f.at(facts, 8))
