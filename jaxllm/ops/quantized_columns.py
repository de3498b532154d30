"""A quantised matrix whose inputs are contiguous, column by column: what the kernel of a GPU multiplies with.

Few rows go to `jaxllm.ops.quantized_gpu`; many, and every other platform, to XLA, a block of inputs at a time. Values
are those of `jaxllm.ops.quantized`.

Dimension letters: M rows, K inputs, N columns, J groups, C inputs of a block, S inputs of a step.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxllm.config.quantization import Scheme
from jaxllm.ops import quantized_gpu
from jaxllm.ops.contraction import contraction, num_contracted
from jaxllm.ops.quantized import QuantizedMatrix, unpack

_BLOCK = 1 << 24  # elements expanded at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedColumns:
    """See the module.

    Attributes:
        codes: `[N, K]` int8, `[N, K]` uint8 that hold float8, or `[N, K/2]` uint8: the halves of each step in a byte.
        scales, minima: `[J, N]`; J is 1 where all inputs share a scale.
        order: int32 `[K]`, the input that each row belongs to; None: in their order.
        scheme: what codes mean.
        remaining: the sizes of the dims that a product keeps.
        dtype: in which it is multiplied.
    """

    codes: jax.Array
    scales: jax.Array
    minima: jax.Array | None
    order: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    remaining: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.codes.shape[1] * (2 if self.scheme.bits == 4 else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, its inputs in one dim."""
        return (self.num_inputs, *self.remaining)

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """Sums over the last dims of x and the inputs of the matrix: `[..., remaining dims]`, float32."""
        first = x.ndim - num_contracted(spec)
        x_MK = x.reshape(-1, self.num_inputs)
        if self.order is not None:
            x_MK = jnp.take(x_MK, self.order, axis=1)
        few = {"cuda": _by_kernel} if x_MK.shape[0] <= quantized_gpu.MOST_ROWS else {}
        x_MK = x_MK.astype(self.dtype)
        y_MN = jax.lax.platform_dependent(x_MK, self, **few, default=by_blocks) if few else by_blocks(x_MK, self)
        return y_MN.reshape(*x.shape[:first], *self.remaining)


def lay_columns(matrix: QuantizedMatrix) -> QuantizedColumns:
    """The same matrix with its inputs contiguous."""
    assert matrix.axis == 0, "the inputs come first"
    scheme, k = matrix.scheme, matrix.num_inputs
    codes_KN = matrix.codes.reshape(matrix.codes.shape[0], -1)
    if scheme.bits == 4:
        step = quantized_gpu.step_of(k, scheme)
        halves = unpack(codes_KN, 0).T.reshape(-1, k // step, 2, step // 2)
        codes = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(-1, k // 2)
    else:
        codes = codes_KN.T
        codes = codes if codes.dtype == jnp.int8 else jax.lax.bitcast_convert_type(codes, jnp.uint8)
    scales, minima = (
        None if part is None else part.reshape(part.shape[0], -1) for part in (matrix.scales, matrix.minima)
    )
    assert scales is not None
    return QuantizedColumns(codes, scales, minima, matrix.order, scheme, matrix.codes.shape[1:], matrix.dtype)


def _by_kernel(x_MK: jax.Array, matrix: QuantizedColumns) -> jax.Array:
    return quantized_gpu.quantized_matmul(x_MK, matrix.codes, matrix.scales, matrix.minima, matrix.scheme)


def by_blocks(x_MK: jax.Array, matrix: QuantizedColumns) -> jax.Array:
    """XLA's product: a block is expanded, multiplied and added: the matrix is never there whole."""
    (n, _), k = matrix.codes.shape, matrix.num_inputs
    units = k // max(matrix.scheme.group, quantized_gpu.step_of(k, matrix.scheme))
    most = max(1, _BLOCK * units // (n * k))
    blocks = units // next(size for size in range(min(most, units), 0, -1) if units % size == 0)

    def cut(array: jax.Array, axis: int, i: int | jax.Array) -> jax.Array:
        parts = array.reshape(*array.shape[:axis], blocks, -1, *array.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(parts, i, axis, keepdims=False)

    def one(i: int | jax.Array) -> jax.Array:
        groups = [
            part if part is None or part.shape[0] == 1 else cut(part, 0, i) for part in (matrix.scales, matrix.minima)
        ]
        assert groups[0] is not None
        w_NC = _expanded(cut(matrix.codes, 1, i), groups[0], groups[1], matrix)
        return contraction("MC,NC->MN", cut(x_MK, 1, i), w_NC)

    return jax.lax.fori_loop(1, blocks, lambda i, total: total + one(i), one(0))


def _expanded(codes: jax.Array, scales: jax.Array, minima: jax.Array | None, matrix: QuantizedColumns) -> jax.Array:
    """`[N, C]` values of some codes, whose groups these are."""
    scheme, n = matrix.scheme, codes.shape[0]
    if scheme.bits == 4:
        pairs = codes.reshape(n, -1, quantized_gpu.step_of(matrix.num_inputs, scheme) // 2)
        codes = jnp.stack([pairs & 15, pairs >> 4], axis=2).reshape(n, -1)
    elif scheme.codes != "int8":
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    numbers = codes.astype(jnp.float32) - scheme.offset
    values = numbers.reshape(n, scales.shape[0], -1) * scales.astype(jnp.float32).T[:, :, None]
    if minima is not None:
        values = values + minima.astype(jnp.float32).T[:, :, None]
    return values.reshape(n, -1).astype(matrix.dtype)
