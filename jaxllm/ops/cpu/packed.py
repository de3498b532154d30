"""Products with bfloat16 weights that are stored in the order in which the kernel reads them.

`x [M, K] @ w [K, N]`, accumulated in float32 by the processor's bfloat16 dot products (VDPBF16PS: two neighbouring
rows of `w` at a time). Weights lie in panels of 32 columns; in a panel two rows lie interleaved, 128 bytes a step, so
that one pass over a panel is one pass over contiguous memory. Up to 12 rows of `x` are multiplied in one pass, their
sums in registers: few rows cost what reading the weights costs, many what multiplying costs. Every row's sum is
formed in the same order whatever stands beside it.

Dimension letters: M rows of x, K contracted, N columns, B panels, C columns of a panel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.cpu import ffi

PANEL = 32  # columns; two registers of sixteen float32 sums for each row of x
_ROWS = 12  # of x at a time: 24 sums, two registers of weights and some to spare, of 32
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


def packs(shape: tuple[int, ...], dtype: jnp.dtype, contracted: tuple[int, ...]) -> bool:
    """Whether a matrix can be kept in panels; `contracted` are the dims that products sum over, none: never."""
    k, n = _sizes(shape, contracted)
    return bool(contracted) and dtype == jnp.bfloat16 and k % 2 == 0 and n % PANEL == 0


def _sizes(shape: tuple[int, ...], contracted: tuple[int, ...]) -> tuple[int, int]:
    k = math.prod(shape[i] for i in contracted)
    return k, math.prod(shape) // k


def abstract_panels(matrix: jax.ShapeDtypeStruct, contracted: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape that `pack` gives."""
    k, n = _sizes(matrix.shape, contracted)
    return jax.ShapeDtypeStruct((n // PANEL, k // 2, PANEL), jnp.uint32)


def pack(matrix: np.ndarray, contracted: tuple[int, ...]) -> np.ndarray:
    """Panels `[B, K/2, C]` of a bfloat16 matrix whose contracted dims are its first or its last."""
    k, n = _sizes(matrix.shape, contracted)
    bits = np.ascontiguousarray(matrix).view(np.uint16)
    if contracted[0] > 0:
        return np.ascontiguousarray(bits.view(np.uint32).reshape(n // PANEL, PANEL, k // 2).swapaxes(1, 2))
    bits = bits.reshape(k // 2, 2, n)
    pairs = bits[:, 1].astype(np.uint32)
    pairs <<= 16
    pairs |= bits[:, 0]
    return np.ascontiguousarray(pairs.reshape(k // 2, n // PANEL, PANEL).swapaxes(0, 1))


def packed_product(x: jax.Array, matrix: PackedMatrix) -> jax.Array:
    """Sums over the last dims of x and the contracted dims of the matrix: `[..., remaining dims]`, float32."""
    width, *remaining = 1, *matrix.remaining
    first = x.ndim
    while width < 2 * matrix.panels.shape[1]:
        first -= 1
        width *= x.shape[first]
    y_MN = matmul(x.reshape(-1, width), matrix.panels)
    return y_MN.reshape(*x.shape[:first], *remaining)


def packed_rows(matrix: PackedMatrix, index_T: jax.Array) -> jax.Array:
    """Rows `[T, K]` of a matrix whose last dim is the contracted one."""
    pairs_TK = matrix.panels[index_T // PANEL, :, index_T % PANEL]
    return jax.lax.bitcast_convert_type(pairs_TK, jnp.bfloat16).reshape(index_T.shape[0], -1)


def matmul(x_MK: jax.Array, panels_BKC: jax.Array) -> jax.Array:
    """float32 `[M, N]`; `x` is rounded to bfloat16."""
    (m, k), (b, _, c) = x_MK.shape, panels_BKC.shape
    num_parts = min(b, 4 * ffi.num_threads())
    name = ffi.register(_kernel(m, k, b, num_parts), num_parts, num_operands=2)
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((m, b * c), jnp.float32))(x_MK.astype(jnp.bfloat16), panels_BKC)


def _kernel(m: int, k: int, num_panels: int, num_parts: int) -> str:
    """All rows of x for some panels."""
    num_passes = -(-m // _ROWS)
    rows, num_larger = divmod(m, num_passes)  # the first `num_larger` passes take one row more
    groups = [(rows + 1, 0, num_larger), (rows, num_larger, num_passes)]
    groups = [group for group in groups if group[1] < group[2]]
    prefetches = 2 if num_passes == 1 else 1
    loops, before = "", "panel"
    for size, first, end in groups:
        start = first * (rows + 1)
        loops += f"""
  br label %group{size}
group{size}:
  %pass{size} = phi i64 [{first}, %{before}], [%pass{size}.next, %group{size}]
  %index{size} = sub i64 %pass{size}, {first}
  %done{size} = mul i64 %index{size}, {size}
  %row{size} = add i64 %done{size}, {start}
  %x_offset{size} = mul i64 %row{size}, {2 * k}
  %x{size} = getelementptr i8, ptr %x, i64 %x_offset{size}
  %y_offset{size} = mul i64 %row{size}, {4 * PANEL * num_panels}
  %y{size} = getelementptr i8, ptr %y_panel, i64 %y_offset{size}
  %ahead{size} = call ptr @ahead(ptr %w_panel, i64 %pass{size})
  call void @rows{size}(ptr %x{size}, ptr %w_panel, ptr %y{size}, ptr %ahead{size})
  %pass{size}.next = add i64 %pass{size}, 1
  %more{size} = icmp slt i64 %pass{size}.next, {end}
  br i1 %more{size}, label %group{size}, label %after{size}
after{size}:"""
        before = f"after{size}"
    panel_bytes = 2 * PANEL * k
    next_panel = f"""
  %second = icmp eq i64 %pass, 1
  %line = select i1 %second, i64 {panel_bytes + 64}, i64 {panel_bytes}
  %spread = icmp slt i64 %pass, 2
  %offset = select i1 %spread, i64 %line, i64 0"""
    return f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

define internal ptr @ahead(ptr %panel, i64 %pass) {{{next_panel if num_passes > 1 else ""}
  %address = getelementptr i8, ptr %panel, i64 {"%offset" if num_passes > 1 else _AHEAD}
  ret ptr %address
}}
{"".join(_rows(size, k, num_panels, prefetches) for size, _, _ in groups)}
define internal void @part(ptr %buffers, i64 %part) {{
entry:
  %x = load ptr, ptr %buffers
  %w_field = getelementptr i8, ptr %buffers, i64 8
  %w = load ptr, ptr %w_field
  %y_field = getelementptr i8, ptr %buffers, i64 16
  %y = load ptr, ptr %y_field
  %first.scaled = mul i64 %part, {num_panels}
  %first = udiv i64 %first.scaled, {num_parts}
  %part.next = add i64 %part, 1
  %end.scaled = mul i64 %part.next, {num_panels}
  %end = udiv i64 %end.scaled, {num_parts}
  br label %panel
panel:
  %b = phi i64 [%first, %entry], [%b.next, %{before}]
  %w_offset = mul i64 %b, {panel_bytes}
  %w_panel = getelementptr i8, ptr %w, i64 %w_offset
  %y_column = mul i64 %b, {4 * PANEL}
  %y_panel = getelementptr i8, ptr %y, i64 %y_column{loops}
  %b.next = add i64 %b, 1
  %more = icmp slt i64 %b.next, %end
  br i1 %more, label %panel, label %exit
exit:
  ret void
}}
"""


def _rows(count: int, k: int, num_panels: int, prefetches: int) -> str:
    """`count` rows of x times one panel: a loop over pairs of k whose sums stay in registers."""
    sums = [(row, half) for row in range(count) for half in (0, 1)]
    phis = "".join(
        f"\n  %sum{r}_{h} = phi <16 x float> [zeroinitializer, %entry], [%sum{r}_{h}.next, %step]" for r, h in sums
    )
    fetch = "".join(
        f"""
  %fetch{i} = getelementptr i8, ptr %ahead, i64 %fetch_offset{i}
  call void @llvm.prefetch.p0(ptr %fetch{i}, i32 0, i32 3, i32 1)"""
        for i in range(prefetches)
    )
    offsets = "".join(f"\n  %fetch_offset{i} = add i64 %w_offset, {64 * i}" for i in range(prefetches))
    loads = "".join(
        f"""
  %w_at{h} = getelementptr i8, ptr %w_step, i64 {64 * h}
  %w{h} = load <32 x bfloat>, ptr %w_at{h}, align 64"""
        for h in (0, 1)
    )
    products = "".join(
        f"""
  %x_at{r} = getelementptr i8, ptr %x_step, i64 {2 * k * r}
  %pair{r} = load i32, ptr %x_at{r}, align 4
  %lane{r} = insertelement <16 x i32> poison, i32 %pair{r}, i64 0
  %lanes{r} = shufflevector <16 x i32> %lane{r}, <16 x i32> poison, <16 x i32> zeroinitializer
  %x{r} = bitcast <16 x i32> %lanes{r} to <32 x bfloat>"""
        + "".join(
            f"""
  %sum{r}_{h}.next = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %sum{r}_{h}, <32 x bfloat> %x{r}, <32 x bfloat> %w{h})"""
            for h in (0, 1)
        )
        for r in range(count)
    )
    stores = "".join(
        f"""
  %y{r}_{h} = getelementptr i8, ptr %y, i64 {4 * PANEL * num_panels * r + 64 * h}
  store <16 x float> %sum{r}_{h}.next, ptr %y{r}_{h}, align 4"""
        for r, h in sums
    )
    return f"""
define internal void @rows{count}(ptr noalias %x, ptr noalias %w, ptr noalias %y, ptr %ahead) noinline {{
entry:
  br label %step
step:
  %k = phi i64 [0, %entry], [%k.next, %step]{phis}
  %w_offset = shl i64 %k, 7
  %w_step = getelementptr i8, ptr %w, i64 %w_offset
  %x_offset = shl i64 %k, 2
  %x_step = getelementptr i8, ptr %x, i64 %x_offset{offsets}{fetch}{loads}{products}
  %k.next = add i64 %k, 1
  %more = icmp slt i64 %k.next, {k // 2}
  br i1 %more, label %step, label %store
store:{stores}
  ret void
}}
"""
