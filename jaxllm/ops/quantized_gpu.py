"""Products of few rows with a quantised matrix on an NVIDIA GPU: a Pallas kernel lowered through Triton.

`x [M, K] @ w [K, N]`, codes as they lie in `jaxllm.ops.quantized.QuantizedMatrix`: a decode reads them once and nothing
else of their size. A program owns a block of columns and a run of groups; each group is multiplied on the tensor cores
with the codes' own numbers, which bfloat16 holds exactly, and its scale and minimum come in afterwards, in float32.
Runs are added up outside. `unsupported` says what the kernel does not know; many rows are better off with XLA's
product, whose expansion of a block is shared by them.

Dimension letters: M rows of x, K inputs, N columns, J groups, S runs of groups.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxllm.config.quantization import Scheme

MOST_ROWS = 256  # beyond, the products outweigh the reading
_MIN_WIDTH = 16  # of a tensor core's product, every side
_STEP = 128  # inputs at a time, at most
_PROGRAMS_WANTED = 1024  # several for each processor of a large GPU
_BFLOAT16_128 = 0x4300  # 128.0; a code below 128 in its last bits adds itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sizes of one program: rows, columns, inputs of a step; warps, and steps in flight."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


def unsupported(m: int, k: int, n: int, scheme: Scheme) -> str | None:
    """Why the kernel cannot or should not multiply so many rows with such a matrix, or None."""
    if scheme.table or scheme.activations is not None:
        return "codes that are no numbers, or activations of 8 bits"
    if m > MOST_ROWS:
        return f"more than {MOST_ROWS} rows"
    least = _MIN_WIDTH * (2 if scheme.bits == 4 else 1)
    if _step(k, scheme) < least or n % (2 * _MIN_WIDTH):
        return f"groups of less than {least} inputs, or columns that are no multiple of {2 * _MIN_WIDTH}"
    return None


def _step(k: int, scheme: Scheme) -> int:
    """Inputs at a time: a power of two that divides the group."""
    group = scheme.group or k
    return min(_STEP, group & -group)


def decode_tiling(m: int, k: int, n: int, scheme: Scheme) -> Tiling:
    """Memory-bound: wide rows of codes, several steps in flight."""
    columns = next(size for size in (128, 64, 32) if n % size == 0)
    rows = min(64, max(_MIN_WIDTH, pl.next_power_of_2(m)))
    return Tiling(rows=rows, columns=columns, step=_step(k, scheme), warps=4, stages=4)


@dataclass(frozen=True, slots=True)
class _Static:
    tiling: Tiling
    scheme: Scheme
    steps: int  # of one run
    dtype: Any


def quantized_matmul(
    x_MK: jax.Array,
    codes: jax.Array,
    scales_JN: jax.Array,
    minima_JN: jax.Array | None,
    scheme: Scheme,
    *,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """float32 `[M, N]`; `x` is multiplied as bfloat16, or exactly where it is float32.

    `codes` are `[K, N]` int8 or float8, or `[K/2, N]` uint8 with two neighbouring inputs in each.
    """
    (m, k), n = x_MK.shape, codes.shape[1]
    t = tiling or decode_tiling(m, k, n, scheme)
    grid_m, grid_n, total = pl.cdiv(m, t.rows), n // t.columns, k // t.step
    wanted = max(1, _PROGRAMS_WANTED // (grid_m * grid_n))
    runs = max(s for s in range(1, min(wanted, total) + 1) if total % s == 0)
    static = _Static(t, scheme, total // runs, x_MK.dtype)
    named = {"x": x_MK, "codes": codes, "scales": scales_JN} | ({} if minima_JN is None else {"minima": minima_JN})
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
    empty = jnp.zeros((c.tiling.rows, c.tiling.columns), jnp.float32)
    total = jax.lax.fori_loop(first, first + c.steps, lambda i, total: total + place.product(i), empty)
    rows, columns = place.rows()[:, None], place.columns()[None, :]
    plgpu.store(out.at[pl.program_id(1), rows, columns], total, mask=rows < out.shape[1])


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

    def product(self, i: jax.Array) -> jax.Array:
        """One step's part of the sum."""
        s, step, halves = self.c.scheme, self.c.tiling.step, 2 if self.c.scheme.bits == 4 else 1
        count = step // halves
        at = i * count + jnp.arange(count, dtype=jnp.int32)
        codes = plgpu.load(self.inputs["codes"].at[at[:, None], self.columns()[None, :]])
        parts = [codes & 15, codes >> 4] if halves == 2 else [codes]
        x_parts = [self._x(at * halves + half) for half in range(halves)]
        y = functools.reduce(jnp.add, [self._dot(x, self._numbers(w)) for x, w in zip(x_parts, parts, strict=True)])
        group = i * step // s.group if s.group else 0
        y = y * self._of_group("scales", group)
        if s.has_minima:
            sums = functools.reduce(jnp.add, [jnp.sum(x.astype(jnp.float32), axis=1) for x in x_parts])
            y = y + sums[:, None] * self._of_group("minima", group)
        return y

    def _x(self, inputs: jax.Array) -> jax.Array:
        rows = self.rows()[:, None]
        mask = jnp.broadcast_to(rows < self.inputs["x"].shape[0], (self.c.tiling.rows, inputs.shape[0]))
        return plgpu.load(self.inputs["x"].at[rows, inputs[None, :]], mask=mask, other=0.0)

    def _of_group(self, name: str, group: Any) -> jax.Array:
        values = plgpu.load(self.inputs[name].at[jnp.full((1, 1), group, jnp.int32), self.columns()[None, :]])
        return values.astype(jnp.float32)

    def _numbers(self, codes: jax.Array) -> jax.Array:
        """Codes as numbers of the product's type; of 4 bits by their place in a bfloat16 that is 128 and more."""
        offset = self.c.scheme.offset
        if self.c.scheme.bits == 4:
            bits = codes.astype(jnp.int16) | jnp.int16(_BFLOAT16_128)
            numbers = jax.lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.bfloat16(128.0)
            numbers = numbers - jnp.bfloat16(offset) if offset else numbers
            return numbers.astype(self.c.dtype)
        numbers = codes.astype(jnp.float32)
        return (numbers - offset if offset else numbers).astype(self.c.dtype)

    def _dot(self, x: jax.Array, w: jax.Array) -> jax.Array:
        precision = "highest" if self.c.dtype == jnp.float32 else None
        return jax.lax.dot(x, w, precision=precision, preferred_element_type=jnp.float32)
