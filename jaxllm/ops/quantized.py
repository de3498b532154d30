"""A quantised matrix, multiplied as it is: codes, and a scale (and minimum) for every group of inputs.

`w[k, n] = scale[k // group, n] * (code[k, n] - offset) + minimum[k // group, n]`. The product here runs on every
platform and is the oracle of the kernels: it expands a bounded block of inputs at a time, never the matrix.

The dims of a parameter that are inputs of its linear (`[K, G, H]` of an output projection) are one dim here; two 4-bit
codes of neighbouring inputs share a byte, the first in its low half.

Dimension letters: E experts (or none), P parts that devices hold, B blocks, C inputs of a block, J groups, N what a
product keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.config.quantization import ACTIVATION_LIMITS, Activations, Scheme
from jaxllm.ops.contraction import contraction
from jaxllm.ops.gather import gather_rows

_BLOCK = {"cpu": 1 << 20, "default": 1 << 24}  # elements of a device's part expanded at a time
_MOST_SUMS = 1 << 23  # of groups, before they are scaled and added
_INPUTS, _PARTS = "z", "p"  # letters of the merged inputs and of their parts in a contraction


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """See the module.

    Attributes:
        codes: `[.., K, ..]` int8 or float8, or `[.., K/2, ..]` uint8 with two codes in each.
        scales, minima: `[.., J, ..]`; J is 1 where all inputs share a scale.
        order: int32 `[.., K]`, the input that each row belongs to; None: in their order. Without the dims kept.
        input_scale: of static activations.
        scheme: what codes mean.
        axis: which dim the inputs are.
        inner: sizes of the parameter's input dims but the first.
        parts: into how many parts devices cut the inputs.
        dtype: in which it is expanded and multiplied.
    """

    codes: jax.Array
    scales: jax.Array
    minima: jax.Array | None
    order: jax.Array | None
    input_scale: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    inner: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        lead, size, kept = self.codes.shape[: self.axis], self.num_inputs, self.codes.shape[self.axis + 1 :]
        return (*lead, size // math.prod(self.inner), *self.inner, *kept)

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.codes.shape[self.axis] * (2 if self.scheme.bits == 4 else 1)

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """The contraction of `x` with the matrix that `spec` says, accumulated in float32."""
        return quantized_product(spec, x, self)

    def rows(self, index_T: jax.Array) -> jax.Array:
        """Rows `[T, K]` of a table `[V, K]`, whose inputs are its last dim."""
        assert self.axis == 1 and self.codes.ndim == 2, "a table has its inputs last"
        codes, scales = gather_rows(self.codes, index_T), gather_rows(self.scales, index_T)
        minima = None if self.minima is None else gather_rows(self.minima, index_T)
        return expand(codes, scales, minima, self.scheme, 1, jnp.dtype(self.dtype))

    def columns(self, start: int, stop: int | None) -> QuantizedMatrix:
        """Some of what the last dim keeps."""
        assert self.axis < self.codes.ndim - 1, "the last dim is the inputs'"
        cut = [None if part is None else part[..., start:stop] for part in (self.codes, self.scales, self.minima)]
        return dataclasses.replace(self, codes=cut[0], scales=cut[1], minima=cut[2])

    def expert(self, number: jax.Array) -> QuantizedMatrix:
        """One of the matrices along the first dim."""
        cut = [None if part is None else part[number] for part in (self.codes, self.scales, self.minima, self.order)]
        return dataclasses.replace(
            self, codes=cut[0], scales=cut[1], minima=cut[2], order=cut[3], axis=self.axis - 1, parts=1
        )

    def specs(self, spec: PartitionSpec) -> QuantizedMatrix:
        """Where each array lies, given where the parameter would: a pytree like this one."""
        return leaf_specs(self, spec)


def leaf_specs(matrix: QuantizedMatrix, spec: PartitionSpec) -> Any:
    """See `QuantizedMatrix.specs`."""
    axis, num = matrix.axis, 1 + len(matrix.inner)
    full = (*spec, *(None,) * (matrix.codes.ndim + num - 1 - len(spec)))
    cut = next((part for part in full[axis : axis + num] if part), None)
    codes = PartitionSpec(*full[:axis], cut, *full[axis + num :])
    groups = codes if matrix.scheme.group else PartitionSpec(*full[:axis], None, *full[axis + num :])
    order = None if matrix.order is None else PartitionSpec(*full[: matrix.order.ndim - 1], None)
    return dataclasses.replace(
        matrix,
        codes=codes,
        scales=groups,
        minima=None if matrix.minima is None else groups,
        order=order,
        input_scale=None if matrix.input_scale is None else PartitionSpec(),
    )


def quantized_product(spec: str, x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
    """The contraction of `x` with the matrix that `spec` says, accumulated in float32."""
    terms, out = spec.split("->")
    x_dims, w_dims = terms.split(",")
    axis, num = matrix.axis, 1 + len(matrix.inner)
    inputs = w_dims[axis : axis + num]
    w_dims = w_dims[:axis] + _PARTS + _INPUTS + w_dims[axis + num :]
    if inputs in out:  # a product that keeps the inputs (absorbed keys): a block of them at a time
        assert num == 1, "inputs that are kept are one dim"
        return _keeping(f"{x_dims},{w_dims}->{_PARTS}{_INPUTS}{out.replace(inputs, '')}", x, matrix, out.index(inputs))
    start = x_dims.index(inputs)
    x = x.reshape(*x.shape[:start], -1, *x.shape[start + num :])
    if matrix.order is not None:
        x = jnp.take(x, matrix.order, axis=start)
    if matrix.scheme.activations is not None:
        x = round_activations(x, start, matrix.scheme.activations, matrix.input_scale, matrix.scheme.group)
    cut_dims = x_dims.replace(inputs, _PARTS + _INPUTS)
    by_blocks = functools.partial(_summing, f"{cut_dims},{w_dims}->{_PARTS}{out}", start=start)
    kept = w_dims.removeprefix(_PARTS + _INPUTS)
    if not (x_dims.endswith(inputs) and out == x_dims.removesuffix(inputs) + kept):
        return by_blocks(x, matrix)
    return _of_few_rows(by_blocks, x, matrix)


def _of_few_rows(otherwise: Callable[[jax.Array, QuantizedMatrix], jax.Array], x: jax.Array, matrix: QuantizedMatrix):
    """Rows `[.., K]` times `[K, ..]`: what a platform does better where reading the codes is all that counts."""
    m, n = math.prod(x.shape[:-1]), math.prod(matrix.codes.shape[1:])
    if matrix.scheme.bits == 4 and m * n * matrix.scales.shape[0] <= _MOST_SUMS:
        return jax.lax.platform_dependent(x, matrix, tpu=_by_groups, default=otherwise)
    return otherwise(x, matrix)


def _by_groups(x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
    """One product for each group, scaled afterwards: both codes of a byte are then elementwise, and the compiler makes
    numbers of them inside of the product. A scaled matrix, or one whose bytes come apart, it would write to memory."""
    dtype, scales = jnp.dtype(matrix.dtype), matrix.scales.astype(jnp.float32)
    num_groups, kept = scales.shape[0], "abcdef"[: scales.ndim - 1]
    pairs = matrix.codes.reshape(num_groups, -1, *matrix.codes.shape[1:])
    x_MJG2 = x.reshape(math.prod(x.shape[:-1]), num_groups, -1, 2).astype(dtype)
    spec = f"MJG,JG{kept}->MJ{kept}"
    y = contraction(spec, x_MJG2[..., 0], _numbers(pairs & 15, matrix.scheme).astype(dtype))
    y = y + contraction(spec, x_MJG2[..., 1], _numbers(pairs >> 4, matrix.scheme).astype(dtype))
    y = jnp.sum(y * scales, axis=1)
    if matrix.minima is not None:
        sums_MJ = jnp.sum(x_MJG2.astype(jnp.float32), axis=(2, 3))
        y = y + jnp.einsum(f"MJ,J{kept}->M{kept}", sums_MJ, matrix.minima.astype(jnp.float32), precision="highest")
    return y.reshape(*x.shape[:-1], *matrix.codes.shape[1:])


def _summing(spec: str, x: jax.Array, matrix: QuantizedMatrix, *, start: int) -> jax.Array:
    """Blocks of inputs are added up on each device, and the devices' parts once at the end."""

    def run(x: jax.Array, matrix: QuantizedMatrix, limit: int) -> jax.Array:
        blocks = _blocks(matrix, limit)
        x = x.astype(matrix.dtype)
        x = x.reshape(*x.shape[:start], matrix.parts, blocks, -1, *x.shape[start + 1 :])

        def one(i: int | jax.Array) -> jax.Array:
            some = jax.lax.dynamic_index_in_dim(x, i, start + 1, keepdims=False)
            return contraction(spec, some, _block(matrix, blocks, i))

        if blocks == 1:
            return jnp.sum(one(0), axis=0)
        total = jax.lax.fori_loop(1, blocks, lambda i, total: total + one(i), one(0))
        return jnp.sum(total, axis=0)

    return _by_platform(run, x, matrix)


def _keeping(spec: str, x: jax.Array, matrix: QuantizedMatrix, place: int) -> jax.Array:
    def run(x: jax.Array, matrix: QuantizedMatrix, limit: int) -> jax.Array:
        blocks = _blocks(matrix, limit)
        x = x.astype(matrix.dtype)
        y = jax.lax.map(lambda i: contraction(spec, x, _block(matrix, blocks, i)), jnp.arange(blocks))  # [B, P, C, ..]
        y = jnp.moveaxis(y, 0, 1)
        y = y.reshape(-1, *y.shape[3:])
        if matrix.order is not None:
            y = y[jnp.argsort(matrix.order)]
        return jnp.moveaxis(y, 0, place)

    return _by_platform(run, x, matrix)


def _by_platform(run: Any, x: jax.Array, matrix: QuantizedMatrix) -> jax.Array:
    """Small blocks on a CPU; elsewhere large ones, whose expansion the compiler puts into the product."""
    return jax.lax.platform_dependent(
        x, matrix, cpu=lambda x, m: run(x, m, _BLOCK["cpu"]), default=lambda x, m: run(x, m, _BLOCK["default"])
    )


def _blocks(matrix: QuantizedMatrix, limit: int) -> int:
    """Into how many blocks each device's inputs are cut: whole groups of about `limit` elements."""
    local = matrix.num_inputs // matrix.parts
    unit = matrix.scheme.group or 2
    per_row = math.prod(matrix.shape) // matrix.num_inputs
    units = max(1, local // unit)
    if local % unit:
        return 1
    most = max(1, limit // (unit * per_row))
    return units // next(n for n in range(min(most, units), 0, -1) if units % n == 0)


def _block(matrix: QuantizedMatrix, blocks: int, i: int | jax.Array) -> jax.Array:
    """`[.., P, C, ..]` of the matrix, expanded."""
    axis = matrix.axis

    def part(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        if array.shape[axis] == 1 and not matrix.scheme.group:  # shared by all inputs
            return jnp.expand_dims(array, axis)
        array = array.reshape(*array.shape[:axis], matrix.parts, blocks, -1, *array.shape[axis + 1 :])
        return jax.lax.dynamic_index_in_dim(array, i, axis + 1, keepdims=False)

    codes, scales, minima = part(matrix.codes), part(matrix.scales), part(matrix.minima)
    return expand(codes, scales, minima, matrix.scheme, axis + 1, jnp.dtype(matrix.dtype))


def expand(codes: Any, scales: Any, minima: Any, scheme: Scheme, axis: int, dtype: jnp.dtype) -> jax.Array:
    """The values of codes whose inputs are dim `axis`; groups are counted from its start."""
    lead, kept = codes.shape[:axis], codes.shape[axis + 1 :]
    numbers = _numbers(unpack(codes, axis) if scheme.bits == 4 else codes, scheme)
    grouped = numbers.reshape(*lead, scales.shape[axis], -1, *kept)
    values = grouped * jnp.expand_dims(scales.astype(jnp.float32), axis + 1)
    if minima is not None:
        values = values + jnp.expand_dims(minima.astype(jnp.float32), axis + 1)
    return values.reshape(numbers.shape).astype(dtype)


def unpack(pairs: jax.Array, axis: int) -> jax.Array:
    """Two 4-bit codes out of each byte, the low one first: dim `axis` doubles."""
    both = jnp.stack([pairs & 15, pairs >> 4], axis=axis + 1)
    return both.reshape(*pairs.shape[:axis], -1, *pairs.shape[axis + 1 :])


def _numbers(codes: jax.Array, scheme: Scheme) -> jax.Array:
    if not scheme.table:
        numbers = codes.astype(jnp.float32)
        return numbers - scheme.offset if scheme.offset else numbers
    numbers = jnp.full(codes.shape, scheme.table[0], jnp.float32)
    for code, value in enumerate(scheme.table[1:], 1):  # a chain of selections fuses; a gather does not
        numbers = jnp.where(codes == code, jnp.float32(value), numbers)
    return numbers


def round_activations(x: jax.Array, axis: int, to: Activations, scale: jax.Array | None, group: int = 0) -> jax.Array:
    """`x` as its 8-bit codes stand for it: with the checkpoint's scale, or with one of its own per token or group."""
    if to.by_group and group:
        grouped = x.reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])
        return round_activations(grouped, axis + 1, to, scale).reshape(x.shape)
    limit = ACTIVATION_LIMITS[to.codes]
    x = x.astype(jnp.float32)
    if scale is None:
        scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axis, keepdims=True), 1e-10) / limit
    if to.codes == "int8":
        codes = jnp.clip(jnp.round(x / scale), -128, 127)
    else:
        codes = jnp.clip(x / scale, -limit, limit).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return codes * scale
