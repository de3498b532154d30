"""From codes to the numbers that the processor multiplies, in registers: bfloat16 pairs or float32, as LLVM IR.

An arithmetic takes a word of codes of sixteen columns and gives vectors of numbers in the order of their inputs, each
of one or two neighbouring inputs of every column, and multiplies such a vector with the same inputs of a row of x.

A word of 4-bit codes holds eight inputs of a column, the even ones in its lower half; one of 8-bit codes four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxllm.ops.cpu.ir import Function
from jaxllm.ops.cpu.lanes import DECLARE_DOT, DOT, PAIRS, VECTOR, ZERO, constant, literal

INTS = "<16 x i32>"
_SHORTS = "<32 x i16>"
_EIGHT = "<8 x float>"
_PICK_SHORTS = "llvm.x86.avx512.permvar.hi.512"
_PICK_SIXTEEN = "llvm.x86.avx512.permvar.sf.512"
_PICK_EIGHT = "llvm.x86.avx2.permps"


@dataclass(frozen=True, slots=True)
class Codes:
    """What a code means.

    Attributes:
        bits: 4 or 8.
        table: the number of each 4-bit code, which bfloat16 holds exactly; codes of 8 bits are numbers, signed.
    """

    bits: int
    table: tuple[float, ...] = ()

    @property
    def per_word(self) -> int:
        """Codes of one column in 32 bits."""
        return 32 // self.bits


class Arithmetic(Protocol):
    """See the module.

    Attributes:
        inputs: of x in one vector of numbers.
        x_bytes: of an input of x.
        kind: LLVM's type of a vector of numbers.
        sums: the type of a group's sums.
        facts: 32-bit numbers known of each row's group, the sum of its inputs last; those that come with x.
        most_alone, most_rows: rows of x that the only pass can take, and one of several.
        declarations: of the functions that it calls.
    """

    inputs: int
    x_bytes: int
    kind: str
    sums: str
    facts: int
    brings_facts: bool
    most_alone: int
    most_rows: int
    declarations: str

    def numbers(self, f: Function, word: str) -> list[str]:
        """The vectors of one word."""
        ...

    def as_numbers(self, f: Function, word: str) -> str:
        """A vector of numbers that was stored."""
        ...

    def same(self, f: Function, pointer: str) -> str:
        """The inputs at a place of x, for every column."""
        ...

    def add_product(self, f: Function, total: str, x: str, numbers: str) -> str:
        """`total + x * numbers`, column by column."""
        ...

    def start(self, f: Function, facts: str) -> str:
        """The sum of no products of a row's group."""
        ...

    def scaled(self, f: Function, total: str, scale: str, facts: str) -> tuple[str, str]:
        """A group's sum and its scale, as float32 numbers to be multiplied."""
        ...

    def sixteen(self, f: Function, pointer: str) -> str:
        """Sixteen inputs at a place of x, as float32."""
        ...


class Pairs:
    """Products of bfloat16 pairs (VDPBF16PS): what the processor multiplies fastest."""

    inputs, x_bytes, kind, sums = 2, 2, PAIRS, VECTOR
    facts, brings_facts = 1, False
    most_alone, most_rows = 12, 6  # of 32 registers a row's sums of a group take two, those of all groups two more
    declarations = f"""
{DECLARE_DOT}declare {_SHORTS} @{_PICK_SHORTS}({_SHORTS}, {_SHORTS})
"""

    def __init__(self, codes: Codes):
        self.codes = codes
        bits = np.array(codes.table * 2, ml_dtypes.bfloat16).view(np.uint16)  # a look-up takes five bits, a code four
        self._table = "<" + ", ".join(f"i16 {number}" for number in bits) + ">"

    def numbers(self, f: Function, word: str) -> list[str]:
        """See `Arithmetic`."""
        if self.codes.bits == 4:
            return [self._picked(f, word, pair) for pair in range(4)]
        floats = [_shifted_byte(f, word, byte) for byte in range(4)]
        halves = [f.let(f"bitcast {VECTOR} {x} to {PAIRS}") for x in floats]
        upper = ", ".join(f"i32 {i}" for lane in range(16) for i in (2 * lane + 1, 2 * lane + 33))
        return [
            f.let(f"shufflevector {PAIRS} {halves[i]}, {PAIRS} {halves[i + 1]}, <32 x i32> <{upper}>") for i in (0, 2)
        ]

    def _picked(self, f: Function, word: str, pair: int) -> str:
        index = f.let(f"bitcast {INTS} {_shifted_right(f, word, 4 * pair)} to {_SHORTS}")
        found = f.let(f"call {_SHORTS} @{_PICK_SHORTS}({_SHORTS} {self._table}, {_SHORTS} {index})")
        return f.let(f"bitcast {_SHORTS} {found} to {PAIRS}")

    def as_numbers(self, f: Function, word: str) -> str:
        """See `Arithmetic`."""
        return f.let(f"bitcast {INTS} {word} to {PAIRS}")

    def same(self, f: Function, pointer: str) -> str:
        """See `Arithmetic`."""
        return self.as_numbers(f, f.splat("i32", f.load("i32", pointer), 16))

    def add_product(self, f: Function, total: str, x: str, numbers: str) -> str:
        """See `Arithmetic`."""
        return f.let(f"call {VECTOR} @{DOT}({VECTOR} {total}, {PAIRS} {x}, {PAIRS} {numbers})")

    def sixteen(self, f: Function, pointer: str) -> str:
        """See `Arithmetic`."""
        bits = f.let(f"zext <16 x i16> {f.load('<16 x i16>', pointer, 2)} to {INTS}")
        return f.let(f"bitcast {INTS} {f.let(f'shl {INTS} {bits}, splat (i32 16)')} to {VECTOR}")

    def start(self, f: Function, facts: str) -> str:
        """See `Arithmetic`."""
        return ZERO

    def scaled(self, f: Function, total: str, scale: str, facts: str) -> tuple[str, str]:
        """See `Arithmetic`."""
        return total, _times_small(f, scale, self.codes)


class Floats:
    """Products in float32, of processors with AVX2 too."""

    inputs, x_bytes, kind, sums = 1, 4, VECTOR, VECTOR
    facts, brings_facts = 1, False
    declarations = f"""
declare {VECTOR} @{_PICK_SIXTEEN}({VECTOR}, {INTS})
declare {_EIGHT} @{_PICK_EIGHT}({_EIGHT}, <8 x i32>)
"""

    def __init__(self, codes: Codes, *, is_wide: bool):
        self.codes, self.is_wide = codes, is_wide
        self.most_alone, self.most_rows = (12, 6) if is_wide else (2, 2)  # of 16 registers four hold a row's sums

    def numbers(self, f: Function, word: str) -> list[str]:
        """See `Arithmetic`."""
        if self.codes.bits == 8:
            return [_shifted_byte(f, word, byte) for byte in range(4)]
        places = [4 * (i // 2) + 16 * (i % 2) for i in range(8)]
        return [self._picked(f, _shifted_right(f, word, place)) for place in places]

    def _picked(self, f: Function, index: str) -> str:
        if self.is_wide:  # looks at four bits
            return f.let(f"call {VECTOR} @{_PICK_SIXTEEN}({VECTOR} {_floats(self.codes.table)}, {INTS} {index})")
        code = f.let(f"and {INTS} {index}, splat (i32 15)")
        halves = []
        for low in (0, 8):
            lanes = ", ".join(f"i32 {low + i}" for i in range(8))
            eight = f.let(f"shufflevector {INTS} {code}, {INTS} poison, <8 x i32> <{lanes}>")
            found = [
                f.let(f"call {_EIGHT} @{_PICK_EIGHT}({_EIGHT} {_floats(part)}, <8 x i32> {eight})")
                for part in (self.codes.table[:8], self.codes.table[8:])
            ]
            is_low = f.let(f"icmp ult <8 x i32> {eight}, splat (i32 8)")
            halves.append(f.let(f"select <8 x i1> {is_low}, {_EIGHT} {found[0]}, {_EIGHT} {found[1]}"))
        every = ", ".join(f"i32 {i}" for i in range(16))
        return f.let(f"shufflevector {_EIGHT} {halves[0]}, {_EIGHT} {halves[1]}, <16 x i32> <{every}>")

    def as_numbers(self, f: Function, word: str) -> str:
        """See `Arithmetic`."""
        return f.let(f"bitcast {INTS} {word} to {VECTOR}")

    def same(self, f: Function, pointer: str) -> str:
        """See `Arithmetic`."""
        return f.splat("float", f.load("float", pointer), 16)

    def add_product(self, f: Function, total: str, x: str, numbers: str) -> str:
        """See `Arithmetic`."""
        return f.let(f"call {VECTOR} @llvm.fma.v16f32({VECTOR} {x}, {VECTOR} {numbers}, {VECTOR} {total})")

    def sixteen(self, f: Function, pointer: str) -> str:
        """See `Arithmetic`."""
        return f.load(VECTOR, pointer)

    def start(self, f: Function, facts: str) -> str:
        """See `Arithmetic`."""
        return ZERO

    def scaled(self, f: Function, total: str, scale: str, facts: str) -> tuple[str, str]:
        """See `Arithmetic`."""
        return total, _times_small(f, scale, self.codes)


def _shifted_right(f: Function, word: str, bits: int) -> str:
    return f.let(f"lshr {INTS} {word}, splat (i32 {bits})") if bits else word


def _shifted_byte(f: Function, word: str, byte: int) -> str:
    """A signed byte of each lane times 2^24 as float32: its sign is where it must be, and its lower half is zero."""
    if byte < 3:
        word = f.let(f"shl {INTS} {word}, splat (i32 {24 - 8 * byte})")
    if byte > 0:
        word = f.let(f"and {INTS} {word}, splat (i32 {-(1 << 24)})")
    return f.let(f"sitofp {INTS} {word} to {VECTOR}")


def _times_small(f: Function, scale: str, codes: Codes) -> str:
    """A scale, less what `_shifted_byte` multiplied numbers with."""
    return scale if codes.bits == 4 else f.let(f"fmul {VECTOR} {scale}, {constant(2.0**-24)}")


def _floats(numbers: tuple[float, ...]) -> str:
    return "<" + ", ".join(f"float {literal(number)}" for number in numbers) + ">"
