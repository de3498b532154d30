"""Products with bfloat16 weights that are stored in the order in which the kernel reads them.

`x [M, K] @ w [K, N]`, accumulated in float32 by the processor's bfloat16 dot products (VDPBF16PS: two neighbouring
rows of `w` at a time). Weights lie in panels of 32 columns; in a panel two rows lie interleaved, 128 bytes a step, so
that one pass over a panel is one pass over contiguous memory. Up to 12 rows of `x` are multiplied in one pass, their
sums in registers: few rows cost what reading the weights costs, many what multiplying costs. Every row's sum is
formed in the same order whatever stands beside it.

Dimension letters: M rows of x, K contracted, N columns, B panels, C columns of a panel.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.contraction import num_contracted
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import DECLARE_DOT, DOT, VECTOR, ZERO

PANEL = 32  # columns; two registers of sixteen float32 sums for each row of x
_ROWS = 12  # of x at a time: 24 sums, two registers of weights and some to spare, of 32
_PACK_ELEMENTS = 1 << 17  # of a matrix packed at a time
DECLARATIONS = f"""
{DECLARE_DOT}declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""
_AHEAD = 4096  # bytes to prefetch ahead where each panel is read once


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A bfloat16 matrix in panels.

    Attributes:
        panels: uint32 `[B, K/2, C]`: rows 2k (low half) and 2k+1 of column c of each panel.
        remaining: the sizes of the dims that a product keeps.
    """

    panels: jax.Array
    remaining: tuple[int, ...] = field(metadata={"static": True})

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """Sums over the last dims of x and the contracted dims of the matrix: `[..., remaining dims]`, float32."""
        return packed_product(x, self, num_contracted(spec))

    def rows(self, index_T: jax.Array) -> jax.Array:
        """See `packed_rows`."""
        return packed_rows(self, index_T)


def packs(shape: tuple[int, ...], dtype: jnp.dtype, contracted: tuple[int, ...]) -> bool:
    """Whether a matrix can be kept in panels; `contracted` are the dims that products sum over, none: never."""
    k, n = _sizes(shape, contracted)
    return bool(contracted) and dtype == jnp.bfloat16 and k % 2 == 0 and n % PANEL == 0


def _sizes(shape: tuple[int, ...], contracted: tuple[int, ...]) -> tuple[int, int]:
    k = math.prod(shape[i] for i in contracted)
    return k, math.prod(shape) // k


def abstract_panels(
    matrix: jax.ShapeDtypeStruct | jax.Array | np.ndarray, contracted: tuple[int, ...]
) -> jax.ShapeDtypeStruct:
    """The shape that `pack` gives."""
    k, n = _sizes(matrix.shape, contracted)
    return jax.ShapeDtypeStruct((n // PANEL, k // 2, PANEL), jnp.uint32)


def pack(matrix: np.ndarray, contracted: tuple[int, ...], out: np.ndarray | None = None) -> np.ndarray:
    """Panels `[B, K/2, C]` of a bfloat16 matrix whose contracted dims are its first or its last."""
    k, n = _sizes(matrix.shape, contracted)
    bits = np.ascontiguousarray(matrix).view(np.uint16)
    shape = (n // PANEL, k // 2, PANEL)
    panels = np.empty(shape, np.uint32) if out is None else out
    if contracted[0] > 0:
        np.copyto(panels, bits.view(np.uint32).reshape(n // PANEL, PANEL, k // 2).swapaxes(1, 2))
        return panels
    rows = bits.reshape(k // 2, 2, n)
    block = max(1, _PACK_ELEMENTS // n)  # pairs of rows at a time, which the processor's cache holds
    for first in range(0, k // 2, block):
        some = rows[first : first + block]
        pairs = some[:, 1].astype(np.uint32)
        pairs <<= 16
        pairs |= some[:, 0]
        panels[:, first : first + block] = pairs.reshape(-1, n // PANEL, PANEL).swapaxes(0, 1)
    return panels


def packed_product(x: jax.Array, matrix: PackedMatrix, contracted: int = 1) -> jax.Array:
    """Sums over so many last dims of x and the contracted dims of the matrix: `[..., remaining dims]`, float32."""
    first, remaining = x.ndim - contracted, matrix.remaining
    width = 2 * matrix.panels.shape[1]
    y_MN = matmul(x.reshape(-1, width), matrix.panels)
    return y_MN.reshape(*x.shape[:first], *remaining)


def packed_rows(matrix: PackedMatrix, index_T: jax.Array) -> jax.Array:
    """Rows `[T, K]` of a matrix whose last dim is the contracted one."""
    pairs_TK = matrix.panels[index_T // PANEL, :, index_T % PANEL]
    return jax.lax.bitcast_convert_type(pairs_TK, jnp.bfloat16).reshape(index_T.shape[0], -1)


def matmul(x_MK: jax.Array, panels_BKC: jax.Array) -> jax.Array:
    """float32 `[M, N]`; `x` is rounded to bfloat16."""
    (m, k), (b, _, c) = x_MK.shape, panels_BKC.shape
    return jax.ffi.ffi_call(_target(m, k, b), jax.ShapeDtypeStruct((m, b * c), jnp.float32))(
        x_MK.astype(jnp.bfloat16), panels_BKC
    )


@functools.cache  # every layer's trace asks again
def _target(m: int, k: int, num_panels: int) -> str:
    num_parts = min(num_panels, 4 * ffi.num_threads())
    return ffi.register(_kernel(m, k, num_panels, num_parts), num_parts, num_operands=2)


def _kernel(m: int, k: int, num_panels: int, num_parts: int) -> str:
    """All rows of x times some of the panels."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    x, w, y = (f.load("ptr", f.at(buffers, 8 * i), 8) for i in range(3))
    with f.loop(*share(f, part, num_parts, num_panels)) as panel:
        multiply_panel(f, (m, k, num_panels), x, w, y, panel)
    return DECLARATIONS + row_functions(m, k, num_panels) + f.text()


def share(f: Function, part: Value, num_parts: int, count: Value) -> tuple[Value, Value]:
    """First and end of a part's share of so many."""
    first = f.arithmetic("udiv", f.mul(part, count), num_parts)
    return first, f.arithmetic("udiv", f.mul(f.add(part, 1), count), num_parts)


def multiply_panel(
    f: Function, sizes: tuple[int, int, int], x: str, w: str, y: str, panel: Value, then: str | None = None
) -> None:
    """All rows of x times one panel, in as few passes over it as there are groups of 12 rows.

    Sizes are M, K and the number of panels; calls `row_functions` of the same. `then` is what will be read next: a
    third pass, which has no more of the next panel to prefetch, prefetches it.
    """
    m, k, num_panels = sizes
    groups, num_passes = _groups(m)
    w_panel, y_panel = f.at(w, f.mul(panel, 2 * PANEL * k)), f.at(y, f.mul(panel, 4 * PANEL))
    for count, begin, stop in groups:
        with f.loop(begin, stop) as nth:
            row = f.add(f.mul(f.sub(nth, begin), count), begin * (count + 1))
            x_rows, y_rows = f.at(x, f.mul(row, 2 * k)), f.at(y_panel, f.mul(row, 4 * PANEL * num_panels))
            ahead = f.at(w_panel, _AHEAD if num_passes == 1 else _next_panel(f, nth, 2 * PANEL * k))
            if then is not None and num_passes > 2:
                is_early = f.let(f"icmp slt i64 {nth}, 2")
                ahead = f.let(f"select i1 {is_early}, ptr {ahead}, ptr {then}")
            f.do(f"call void @rows{count}(ptr {x_rows}, ptr {w_panel}, ptr {y_rows}, ptr {ahead})")


def _groups(m: int) -> tuple[list[tuple[int, int, int]], int]:
    """(rows of a pass, first pass, end) and how many passes there are; the first ones take one row more."""
    num_passes = -(-m // _ROWS)
    rows, num_larger = divmod(m, num_passes)
    groups = [(rows + 1, 0, num_larger), (rows, num_larger, num_passes)]
    return [group for group in groups if group[1] < group[2]], num_passes


def row_functions(m: int, k: int, num_panels: int) -> str:
    """What `multiply_panel` calls."""
    groups, num_passes = _groups(m)
    return "".join(_rows(count, k, num_panels, prefetches=2 if num_passes == 1 else 1) for count, _, _ in groups)


def _next_panel(f: Function, nth: Value, panel_bytes: int) -> Value:
    """What a pass prefetches: the first two each half of the next panel, the others nothing new."""
    is_early = f.let(f"icmp slt i64 {nth}, 2")
    return f.let(f"select i1 {is_early}, i64 {f.add(f.mul(nth, 64), panel_bytes)}, i64 0")


def _rows(count: int, k: int, num_panels: int, prefetches: int) -> str:
    """`count` rows of x times one panel, the sums in registers. Arguments: x, panel, y, what to prefetch."""
    f = Function(f"rows{count}", ["ptr"] * 4, "noinline")
    x, w, y, ahead = f.args
    sums = {(row, half): f.variable(VECTOR, ZERO) for row in range(count) for half in (0, 1)}
    with f.loop(0, k // 2) as pair:
        step = f.mul(pair, 4 * PANEL)
        for i in range(prefetches):
            f.do(f"call void @llvm.prefetch.p0(ptr {f.at(f.at(ahead, step), 64 * i)}, i32 0, i32 3, i32 1)")
        weights = [f.load("<32 x bfloat>", f.at(f.at(w, step), 64 * half), 64) for half in (0, 1)]
        column = f.at(x, f.mul(pair, 4))
        for row in range(count):
            both = f.splat("i32", f.load("i32", f.at(column, 2 * k * row)), 16)
            numbers = f.let(f"bitcast <16 x i32> {both} to <32 x bfloat>")
            for half in (0, 1):
                operands = f"<32 x bfloat> {numbers}, <32 x bfloat> {weights[half]}"
                total = sums[row, half]
                total.set(f.let(f"call {VECTOR} @{DOT}({VECTOR} {total.get()}, {operands})"))
    for (row, half), total in sums.items():
        f.store(VECTOR, total.get(), f.at(y, 4 * PANEL * num_panels * row + 64 * half))
    return f.text()
