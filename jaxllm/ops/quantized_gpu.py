"""Products of few rows with a quantised matrix on an NVIDIA GPU: a Pallas kernel lowered through Triton.

`x [M, K] @ w [K, N]` of codes whose inputs are contiguous (`jaxllm.ops.quantized_columns`): a decode reads them once
and nothing else of their size. A program owns a block of columns and a run of steps; each step is multiplied on the
tensor cores with the codes' own numbers, which bfloat16 holds exactly, and scale and minimum come in afterwards, in
float32. Runs are added up outside. `unsupported` says what the kernel does not know; many rows are better off with
XLA's product, whose expansion of a block is shared by them.

What decides is how many instructions a code takes, beside a memory that delivers four of them per nanosecond and
processor. Inputs that are contiguous reach the tensor cores' registers four bytes at a time, and four bytes become
numbers in a few instructions on whole words (`_WORDS`); byte by byte, as a compiler does it, it is three times as many.

Dimension letters: M rows of x, K inputs, N columns, J groups, S runs of steps.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxllm.config.quantization import Scheme

MOST_ROWS = 256  # beyond, the products outweigh the reading
_MIN_WIDTH = 16  # of a tensor core's product, every side
_STEP = 128  # inputs at a time, at most
_BFLOAT16_128 = 0x4300  # 128.0; a code below 128 in its last bits adds itself

# Four bytes ($2) -> four bfloat16 numbers ($0, $1). `prmt` puts a byte under the upper half of a number; the fused
# multiply-add (there since Ampere) takes what it added away again, or multiplies where exponents differ by a constant.
_WORDS = {
    "low": """{ .reg .b32 a, one, off; mov.b32 one, 0x3F803F80; mov.b32 off, OFFSET;
        and.b32 a, $2, 0x0F0F0F0F;
        prmt.b32 $0, a, 0x43434343, 0x4140; fma.rn.bf16x2 $0, $0, one, off;
        prmt.b32 $1, a, 0x43434343, 0x4342; fma.rn.bf16x2 $1, $1, one, off; }""",
    "high": """{ .reg .b32 a, one, off; mov.b32 one, 0x3F803F80; mov.b32 off, OFFSET;
        shr.u32 a, $2, 4; and.b32 a, a, 0x0F0F0F0F;
        prmt.b32 $0, a, 0x43434343, 0x4140; fma.rn.bf16x2 $0, $0, one, off;
        prmt.b32 $1, a, 0x43434343, 0x4342; fma.rn.bf16x2 $1, $1, one, off; }""",
    # 128 + the lower seven bits, less 128, or 256 where the sign is set: that bit doubles 128
    "int8": """{ .reg .b32 a, s, p, q, one; mov.b32 one, 0x3F803F80;
        and.b32 a, $2, 0x7F7F7F7F; and.b32 s, $2, 0x80808080;
        prmt.b32 p, a, 0x43434343, 0x4140; prmt.b32 q, s, 0xC3C3C3C3, 0x4140; fma.rn.bf16x2 $0, p, one, q;
        prmt.b32 p, a, 0x43434343, 0x4342; prmt.b32 q, s, 0xC3C3C3C3, 0x4342; fma.rn.bf16x2 $1, p, one, q; }""",
    # exponent and mantissa four bits further down; bfloat16's bias is greater by 120
    "float8_e4m3fn": """{ .reg .b32 h, s, m, up, zero; mov.b32 up, 0x7B807B80; mov.b32 zero, 0x80008000;
        prmt.b32 h, $2, 0, 0x1404; and.b32 s, h, 0x80008000; shr.u32 m, h, 4; and.b32 m, m, 0x07F007F0;
        or.b32 m, m, s; fma.rn.bf16x2 $0, m, up, zero;
        prmt.b32 h, $2, 0, 0x3424; and.b32 s, h, 0x80008000; shr.u32 m, h, 4; and.b32 m, m, 0x07F007F0;
        or.b32 m, m, s; fma.rn.bf16x2 $1, m, up, zero; }""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes of one program: rows and columns; warps, and steps in flight; and how many programs are wanted."""

    rows: int
    columns: int
    warps: int
    stages: int
    programs: int


def unsupported(k: int, n: int, scheme: Scheme) -> str | None:
    """Why the kernel cannot multiply with such a matrix, or None."""
    if scheme.table or scheme.activations is not None:
        return "codes that are no numbers, or activations of 8 bits"
    least = _MIN_WIDTH * (2 if scheme.bits == 4 else 1)
    if step_of(k, scheme) < least or n % (2 * _MIN_WIDTH):
        return f"groups of less than {least} inputs, or columns that are no multiple of {2 * _MIN_WIDTH}"
    return None


def step_of(k: int, scheme: Scheme) -> int:
    """Inputs at a time: a power of two that divides the group."""
    group = scheme.group or k
    return min(_STEP, group & -group)


def decode_tiling(m: int, n: int, scheme: Scheme) -> Tiling:
    """What was fastest on an H100, of about ten neighbours at 1 and at 32 rows."""
    wanted = 128 if scheme.bits == 4 else 64
    columns = next(size for size in (wanted, 64, 32) if n % size == 0)
    rows = min(64, max(_MIN_WIDTH, pl.next_power_of_2(m)))
    return Tiling(rows=rows, columns=columns, warps=4 if rows == _MIN_WIDTH else 2, stages=3, programs=528)


@dataclass(frozen=True, slots=True)
class _Static:
    tiling: Tiling
    scheme: Scheme
    step: int
    steps: int  # of one run
    dtype: Any
    interpret: bool

    @property
    def columns_first(self) -> bool:
        """Whether products are `[N, M]`: the matrix is then the operand of which the tensor cores take 16 at a time."""
        return self.tiling.rows > _MIN_WIDTH and self.tiling.columns >= 64


def quantized_matmul(
    x_MK: jax.Array,
    codes_NK: jax.Array,
    scales_JN: jax.Array,
    minima_JN: jax.Array | None,
    scheme: Scheme,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """float32 `[M, N]`; `x` is multiplied as bfloat16, or exactly where it is float32.

    `codes` are `[N, K]` int8, `[N, K]` uint8 that hold float8, or `[N, K/2]` uint8 with the two halves of each step
    (`step_of`) in one byte, the first in its low half.
    """
    (m, k), n = x_MK.shape, codes_NK.shape[0]
    t, step = tiling or decode_tiling(m, n, scheme), step_of(k, scheme)
    grid_m, grid_n, total = pl.cdiv(m, t.rows), n // t.columns, k // step
    wanted = max(1, t.programs // (grid_m * grid_n))
    runs = max(s for s in range(1, min(wanted, total) + 1) if total % s == 0)
    static = _Static(t, scheme, step, total // runs, x_MK.dtype, interpret)
    named = {"x": x_MK, "codes": codes_NK, "scales": scales_JN} | ({} if minima_JN is None else {"minima": minima_JN})
    y_SMN = pl.pallas_call(
        functools.partial(_kernel, tuple(named), static),
        out_shape=jax.ShapeDtypeStruct((runs, m, n), jnp.float32),
        grid=(grid_n, runs, grid_m),
        compiler_params=plgpu.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name="quantized_matmul",
    )(*named.values())
    return jnp.sum(y_SMN, axis=0) if runs > 1 else y_SMN[0]


def _kernel(names: tuple[str, ...], c: _Static, *refs: Any) -> None:
    """One program: a block of columns, a run of steps, a block of rows."""
    place = _Place(dict(zip(names, refs, strict=False)), c, pl.program_id(0), pl.program_id(2))
    first, out = pl.program_id(1) * c.steps, refs[-1]
    shape = (c.tiling.columns, c.tiling.rows) if c.columns_first else (c.tiling.rows, c.tiling.columns)
    empty = jnp.zeros(shape, jnp.float32)
    total = jax.lax.fori_loop(first, first + c.steps, lambda i, total: total + place.product(i), empty)
    rows, columns = place.across(place.rows(), place.columns())
    mask = jnp.broadcast_to(rows < out.shape[1], shape)
    plgpu.store(out.at[pl.program_id(1), rows, columns], total, mask=mask)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """A program's rows and columns."""

    inputs: dict[str, Any]
    c: _Static
    column_block: jax.Array
    row_block: jax.Array

    def rows(self) -> jax.Array:
        return self.row_block * self.c.tiling.rows + jnp.arange(self.c.tiling.rows, dtype=jnp.int32)

    def columns(self) -> jax.Array:
        return self.column_block * self.c.tiling.columns + jnp.arange(self.c.tiling.columns, dtype=jnp.int32)

    def across(self, of_rows: jax.Array, of_columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both as they lie along the product's two dims."""
        if self.c.columns_first:
            return of_rows[None, :], of_columns[:, None]
        return of_rows[:, None], of_columns[None, :]

    def product(self, i: jax.Array) -> jax.Array:
        """One step's part of the sum."""
        s, step, halves = self.c.scheme, self.c.step, 2 if self.c.scheme.bits == 4 else 1
        count = step // halves
        each = jnp.arange(count, dtype=jnp.int32)
        codes = plgpu.load(self.inputs["codes"].at[self.columns()[:, None], (i * count + each)[None, :]])
        x_parts = [self._x(i * step + half * count + each) for half in range(halves)]
        parts = [self._dot(x, w) for x, w in zip(x_parts, self._numbers(codes), strict=True)]
        y = functools.reduce(jnp.add, parts)
        group = i * step // s.group if s.group else 0
        y = y * self._of_group("scales", group)
        if s.has_minima:
            sums_M = functools.reduce(jnp.add, [jnp.sum(x.astype(jnp.float32), axis=1) for x in x_parts])
            y = y + self.across(sums_M, sums_M)[0] * self._of_group("minima", group)
        return y

    def _x(self, inputs: jax.Array) -> jax.Array:
        rows = self.rows()[:, None]
        mask = jnp.broadcast_to(rows < self.inputs["x"].shape[0], (self.c.tiling.rows, inputs.shape[0]))
        return plgpu.load(self.inputs["x"].at[rows, inputs[None, :]], mask=mask, other=0.0)

    def _of_group(self, name: str, group: Any) -> jax.Array:
        columns = self.columns()
        values = plgpu.load(self.inputs[name].at[jnp.full(columns.shape, group, jnp.int32), columns])
        return self.across(columns, values.astype(jnp.float32))[1]

    def _numbers(self, codes: jax.Array) -> list[jax.Array]:
        """Codes as numbers of the product's type: of 4 bits, those of each half of the step."""
        s = self.c.scheme
        if s.bits == 4:
            return [_of_words(codes, half, s.offset, self.c.interpret).astype(self.c.dtype) for half in ("low", "high")]
        numbers = _of_words(codes, s.codes, 0, self.c.interpret)
        return [(numbers - jnp.bfloat16(s.offset) if s.offset else numbers).astype(self.c.dtype)]

    def _dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        precision = "highest" if self.c.dtype == jnp.float32 else None
        first, second = (w, x) if self.c.columns_first else (x, w)
        dims = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(first, second, dims, precision=precision, preferred_element_type=jnp.float32)


def _of_words(codes: jax.Array, kind: str, offset: int, interpret: bool) -> jax.Array:
    """bfloat16 numbers of bytes: `_WORDS[kind]`, or the same by operations that can be interpreted."""
    if not interpret:
        added = int(np.asarray(-128 - offset, ml_dtypes.bfloat16).view(np.uint16))
        (numbers,) = plgpu.elementwise_inline_asm(
            _WORDS[kind].replace("OFFSET", f"0x{added:04X}{added:04X}"),
            args=[codes],
            constraints="=r,=r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
        )
        return numbers
    if kind == "int8":
        return codes.astype(jnp.bfloat16)
    if kind == "float8_e4m3fn":
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.bfloat16)
    bits = (codes & 15 if kind == "low" else codes >> 4).astype(jnp.int16) | jnp.int16(_BFLOAT16_128)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.bfloat16(128 + offset)
