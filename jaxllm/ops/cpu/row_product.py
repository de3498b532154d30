"""`x^T c`: a product that sums over the rows of both sides, as the derivative by a matrix does.

`x [T, K]` bfloat16 and `c [T, N]` float32 or bfloat16 -> float32 `[K, N]`, accumulated in float32 by the processor's
bfloat16 dot products, which take two neighbouring rows at a time; XLA's CPU backend has no narrow product of this form.
A part of the work is a tile of the result: both sides' columns of it are rounded and interleaved in pairs of rows once.

Dimension letters: T rows, K columns of x, N columns of c.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.ir import Function, Value
from jaxllm.ops.cpu.lanes import BYTES, DECLARE_DOT, DOT, VECTOR, ZERO

_TILE = 64  # rows and columns of a tile, at most
_ROWS = 8  # of a tile at a time, with 32 columns: 16 sums
_MOST_T = 512  # rows that are interleaved at a time: 64 kB of each side
_PAIRS = ", ".join(f"i32 {i}, i32 {i + 16}" for i in range(16))
_DECLARATIONS = f"""
{DECLARE_DOT}declare ptr @aligned_alloc(i64, i64)
"""


def takes(x_TK: jax.Array, c_TN: jax.Array) -> bool:
    """Whether the kernel is written for these sizes."""
    (t, k), n = x_TK.shape, c_TN.shape[1]
    is_known = x_TK.dtype == jnp.bfloat16 and c_TN.dtype in (jnp.float32, jnp.bfloat16)
    return is_known and t % 2 == 0 and k % 16 == 0 and n % 32 == 0 and t * k * n > 0


def row_product(x_TK: jax.Array, c_TN: jax.Array) -> jax.Array:
    """Float32 `[K, N]`, of what `takes` says."""
    (t, k), n = x_TK.shape, c_TN.shape[1]
    result = jax.ShapeDtypeStruct((k, n), jnp.float32)
    return jax.ffi.ffi_call(_target(t, k, n, c_TN.dtype.name), result)(x_TK, c_TN)


@functools.cache  # every layer's trace asks again
def _target(t: int, k: int, n: int, kind: str) -> str:
    tall = next(size for size in (_TILE, 32, 16) if k % size == 0)
    wide = next(size for size in (_TILE, 32) if n % size == 0)
    chunks = next(i for i in range(-(-t // _MOST_T), t) if t % (2 * i) == 0) if t > _MOST_T else 1
    text = _part(t, k, n, tall, wide, t // chunks, {"float32": "float", "bfloat16": "bfloat"}[kind])
    return ffi.register(_DECLARATIONS + text, k // tall * (n // wide), num_operands=2)


def _part(t: int, k: int, n: int, tall: int, wide: int, chunk: int, kind: str) -> str:
    """One tile of the result, chunks of rows one after the other."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    x, c, out = (f.load("ptr", f.at(buffers, 8 * i), 8) for i in range(3))
    row = f.mul(f.arithmetic("udiv", part, n // wide), tall)
    column = f.mul(f.arithmetic("urem", part, n // wide), wide)
    left = f.let(f"call ptr @aligned_alloc(i64 {BYTES}, i64 {2 * chunk * (tall + wide)})")
    right = f.at(left, 2 * chunk * tall)
    corner = f.at(out, f.mul(f.add(f.mul(row, n), column), 4))
    with f.loop(0, tall) as r:
        for v in range(0, 4 * wide, BYTES):
            f.store(VECTOR, ZERO, f.at(f.at(corner, f.mul(r, 4 * n)), v), BYTES)
    with f.loop(0, t, chunk) as first:
        _interleave(f, f.at(x, f.mul(f.add(f.mul(first, k), row), 2)), "bfloat", k, left, tall, chunk)
        size = 4 if kind == "float" else 2
        _interleave(f, f.at(c, f.mul(f.add(f.mul(first, n), column), size)), kind, n, right, wide, chunk)
        with f.loop(0, tall, _ROWS) as r, f.loop(0, 4 * wide, 2 * BYTES) as at:
            target = f.at(f.at(corner, f.mul(r, 4 * n)), at)
            _add(f, f.at(left, f.mul(r, 4)), f.at(right, at), target, (4 * tall, 4 * wide, 4 * n), chunk // 2)
    f.do(f"call void @free(ptr {left})")
    return f.text()


def _interleave(f: Function, source: str, kind: str, width: int, target: str, count: int, chunk: int) -> None:
    """Some columns of rows 2i and 2i + 1 become pairs of bfloat16."""
    size = 4 if kind == "float" else 2
    with f.loop(0, chunk // 2) as pair:
        for v in range(0, count, 16):
            at = f.at(source, f.add(f.mul(pair, 2 * size * width), size * v))
            rows = [_rounded(f, kind, f.at(at, i * size * width)) for i in (0, 1)]
            both = f.let(f"shufflevector <16 x bfloat> {rows[0]}, <16 x bfloat> {rows[1]}, <32 x i32> <{_PAIRS}>")
            f.store("<32 x bfloat>", both, f.at(target, f.add(f.mul(pair, 4 * count), 4 * v)), BYTES)


def _rounded(f: Function, kind: str, pointer: str) -> str:
    x = f.load(f"<16 x {kind}>", pointer, 2)
    return x if kind == "bfloat" else f.let(f"fptrunc <16 x float> {x} to <16 x bfloat>")


def _add(f: Function, left: str, right: str, target: str, strides: tuple[int, int, int], pairs: Value) -> None:
    """Add the products of some pairs of rows to 8 rows and 32 columns of the result; strides are in bytes."""
    places = {(r, v): f.at(target, r * strides[2] + v) for r in range(_ROWS) for v in (0, BYTES)}
    totals = {place: f.variable(VECTOR, f.load(VECTOR, at, BYTES)) for place, at in places.items()}
    with f.loop(0, pairs) as pair:
        line, column = f.at(right, f.mul(pair, strides[1])), f.at(left, f.mul(pair, strides[0]))
        numbers = {v: f.load("<32 x bfloat>", f.at(line, v), BYTES) for v in (0, BYTES)}
        for r in range(_ROWS):
            both = f.splat("i32", f.load("i32", f.at(column, 4 * r)), 16)
            both = f.let(f"bitcast <16 x i32> {both} to <32 x bfloat>")
            for v, number in numbers.items():
                operands = f"{VECTOR} {totals[r, v].get()}, <32 x bfloat> {both}, <32 x bfloat> {number}"
                totals[r, v].set(f.let(f"call {VECTOR} @{DOT}({operands})"))
    for place, total in totals.items():
        f.store(VECTOR, total.get(), places[place], BYTES)
