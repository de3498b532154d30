"""The gated activation `silu(gate) * up` and its derivative, each in one pass over its numbers.

XLA's CPU backend makes five passes of them, each through memory. Float32 `[T, 2, F]` -> `[T, F]`.

Dimension letters: T tokens, F feed-forward width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.ir import Function
from jaxllm.ops.cpu.lanes import BYTES, DECLARATIONS, VECTOR, ZERO, Lanes, constant


def takes(h_TXF: jax.Array) -> bool:
    """Whether the kernel is written for these numbers."""
    return h_TXF.dtype == jnp.float32 and h_TXF.shape[1] == 2 and h_TXF.shape[2] % 16 == 0


@jax.custom_vjp
def swiglu(h_TXF: jax.Array) -> jax.Array:
    """`[T, 2, F]` (gate, up) -> `[T, F]`, of what `takes` says."""
    t, _, f = h_TXF.shape
    return jax.ffi.ffi_call(_target(t, f, derivative=False), jax.ShapeDtypeStruct((t, f), jnp.float32))(h_TXF)


def _forward(h_TXF: jax.Array) -> tuple[jax.Array, jax.Array]:
    return swiglu(h_TXF), h_TXF


def _backward(h_TXF: jax.Array, change_TF: jax.Array) -> tuple[jax.Array]:
    t, _, f = h_TXF.shape
    result = jax.ShapeDtypeStruct(h_TXF.shape, jnp.float32)
    return (jax.ffi.ffi_call(_target(t, f, derivative=True), result)(h_TXF, change_TF),)


swiglu.defvjp(_forward, _backward)


@functools.cache  # every layer's trace asks again
def _target(num_rows: int, width: int, *, derivative: bool) -> str:
    num_parts = min(num_rows, 4 * ffi.num_threads())
    kernel = DECLARATIONS + _part(num_rows, width, num_parts, derivative=derivative)
    return ffi.register(kernel, num_parts, num_operands=2 if derivative else 1)


def _part(num_rows: int, width: int, num_parts: int, *, derivative: bool) -> str:
    """Some rows; the sizes of rows are multiples of a vector."""
    f = Function("part", ["ptr", "i64"])
    buffers, part = f.args
    *operands, out = (f.load("ptr", f.at(buffers, 8 * i), 8) for i in range(3 if derivative else 2))
    first = f.arithmetic("udiv", f.mul(part, num_rows), num_parts)
    end = f.arithmetic("udiv", f.mul(f.add(part, 1), num_rows), num_parts)
    row = 4 * width
    with f.loop(first, end) as t, f.loop(0, row, BYTES) as column:
        single, double = f.add(f.mul(t, row), column), f.add(f.mul(t, 2 * row), column)
        gate_at = f.at(operands[0], double)
        if derivative:
            _change(f, gate_at, f.at(operands[1], single), f.at(out, double), row)
        else:
            _value(f, gate_at, f.at(out, single), row)
    return f.text()


def _value(f: Function, gate_at: str, out: str, row: int) -> None:
    lanes = Lanes(f)
    gate, up = lanes.load(gate_at), lanes.load(f.at(gate_at, row))
    lanes.store(lanes.mul(lanes.mul(gate, _sigmoid(lanes, gate)), up), out)


def _change(f: Function, gate_at: str, change_at: str, out: str, row: int) -> None:
    """With `s = sigmoid(g)`: `du = c g s` and `dg = c u s (1 + g (1 - s))`."""
    lanes = Lanes(f)
    gate, up, change = lanes.load(gate_at), lanes.load(f.at(gate_at, row)), lanes.load(change_at)
    share = _sigmoid(lanes, gate)
    scaled = lanes.mul(change, share)
    slope = lanes.fma(gate, lanes.sub(constant(1.0), share), constant(1.0))
    lanes.store(lanes.mul(lanes.mul(scaled, up), slope), out)
    lanes.store(lanes.mul(scaled, gate), f.at(out, row))


def _sigmoid(lanes: Lanes, x: str) -> str:
    """With `z = exp(-|x|)`: `1 / (1 + z)`, or `z / (1 + z)` below zero; never a large power."""
    size = lanes.maximum(x, lanes.sub(ZERO, x))
    z = lanes.power(lanes.mul(size, constant(-math.log2(math.e))))
    inverse = lanes.div(constant(1.0), lanes.add(constant(1.0), z))
    positive = lanes.f.let(f"fcmp oge {VECTOR} {x}, {ZERO}")
    return lanes.select(positive, inverse, lanes.mul(z, inverse))
