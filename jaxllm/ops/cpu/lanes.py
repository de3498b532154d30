"""Arithmetic on vectors of 16 float32 numbers, as LLVM IR: what the kernels have in common.

`Lanes(function)` appends instructions to an `ir.Function`; values are names of vectors. Knows nothing of what the lanes
stand for.
"""

from __future__ import annotations

import math

import numpy as np

from jaxllm.ops.cpu.ir import Function

VECTOR = "<16 x float>"
PAIRS = "<32 x bfloat>"
BYTES = 64  # of a vector
ZERO = "zeroinitializer"
DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
DECLARE_DOT = f"declare {VECTOR} @{DOT}({VECTOR}, {PAIRS}, {PAIRS})\n"
DECLARATIONS = f"""
declare {VECTOR} @llvm.fma.v16f32({VECTOR}, {VECTOR}, {VECTOR})
declare {VECTOR} @llvm.maxnum.v16f32({VECTOR}, {VECTOR})
declare {VECTOR} @llvm.copysign.v16f32({VECTOR}, {VECTOR})
declare {VECTOR} @llvm.fabs.v16f32({VECTOR})
declare {VECTOR} @llvm.rint.v16f32({VECTOR})
{DECLARE_DOT}"""


def literal(number: float) -> str:
    """A float32 constant, which LLVM writes as the bits of the float64."""
    return f"0x{np.float64(np.float32(number)).view(np.uint64):016X}"


def constant(number: float) -> str:
    """A vector of one constant."""
    return f"splat (float {literal(number)})"


class Lanes:
    """Appends to `function`."""

    def __init__(self, function: Function):
        self.f = function

    def load(self, pointer: str) -> str:
        """A vector from aligned memory."""
        return self.f.load(VECTOR, pointer, BYTES)

    def store(self, x: str, pointer: str) -> None:
        """A vector to aligned memory."""
        self.f.store(VECTOR, x, pointer, BYTES)

    def add(self, x: str, y: str) -> str:
        """`x + y`."""
        return self.f.let(f"fadd {VECTOR} {x}, {y}")

    def sub(self, x: str, y: str) -> str:
        """`x - y`."""
        return self.f.let(f"fsub {VECTOR} {x}, {y}")

    def mul(self, x: str, y: str) -> str:
        """`x * y`."""
        return self.f.let(f"fmul {VECTOR} {x}, {y}")

    def div(self, x: str, y: str) -> str:
        """`x / y`."""
        return self.f.let(f"fdiv {VECTOR} {x}, {y}")

    def fma(self, x: str, y: str, z: str) -> str:
        """`x * y + z`, rounded once."""
        return self._call("fma", x, y, z)

    def dot(self, x: str, y: str, z: str) -> str:
        """`x * y + z`, where x and y hold two bfloat16 numbers in each lane and both products are added."""
        x, y = (self.f.let(f"bitcast {VECTOR} {v} to {PAIRS}") for v in (x, y))
        return self.f.let(f"call {VECTOR} @{DOT}({VECTOR} {z}, {PAIRS} {x}, {PAIRS} {y})")

    def halves(self, x: str) -> str:
        """Rounded to bfloat16, as 16 integers of 16 bits."""
        return self.f.let(f"bitcast <16 x bfloat> {self.f.let(f'fptrunc {VECTOR} {x} to <16 x bfloat>')} to <16 x i16>")

    def maximum(self, x: str, y: str) -> str:
        """The larger of each pair."""
        return self._call("maxnum", x, y)

    def equal(self, x: str, y: str) -> str:
        """A mask."""
        return self.f.let(f"fcmp oeq {VECTOR} {x}, {y}")

    def select(self, mask: str, x: str, y: str) -> str:
        """x where the mask is set, else y."""
        return self.f.let(f"select <16 x i1> {mask}, {VECTOR} {x}, {VECTOR} {y}")

    def power(self, x: str, degree: int = 7) -> str:
        """2^x for x <= 0: whole powers by the exponent's bits, the rest (within a half) by its Taylor polynomial.

        A polynomial of degree 7 is right to float32's last bit or two, of degree 4 to 4e-5.
        """
        x = self.maximum(x, constant(-126.0))
        whole = self._call("rint", x)
        rest = self.sub(x, whole)
        y = constant(math.log(2) ** degree / math.factorial(degree))
        for n in range(degree - 1, -1, -1):
            y = self.fma(y, rest, constant(math.log(2) ** n / math.factorial(n)))
        exponent = self.f.let(f"fptosi {VECTOR} {whole} to <16 x i32>")
        exponent = self.f.let(f"shl <16 x i32> {exponent}, splat (i32 23)")
        bits = self.f.let(f"add <16 x i32> {self.f.let(f'bitcast {VECTOR} {y} to <16 x i32>')}, {exponent}")
        return self.f.let(f"bitcast <16 x i32> {bits} to {VECTOR}")

    def tanh(self, x: str) -> str:
        """tanh(x) = sign(x) (1 - z) / (1 + z) with z = exp(-2|x|)."""
        z = self.power(self.mul(self._call("fabs", x), constant(-2 * math.log2(math.e))))
        return self._call("copysign", self.div(self.sub(constant(1.0), z), self.add(constant(1.0), z)), x)

    def _call(self, name: str, *values: str) -> str:
        return self.f.let(f"call {VECTOR} @llvm.{name}.v16f32({', '.join(f'{VECTOR} {v}' for v in values)})")
