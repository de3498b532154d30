"""Products with quantised weights that are stored in the order in which the kernel reads them.

`x [M, K] @ w [K, N]` where `w = scale * number(code) + minimum`, with a scale (and minimum) of each column for every
group of inputs. Accumulated in float32; with bfloat16 x is rounded to it and nothing else is, with float32 nothing.
Codes lie in panels of 32 columns, 32 bits of a column side by side (see `jaxllm.ops.cpu.quantized_numbers`), scales and
minima in panels of their own.

Dimension letters: M rows of x, K contracted, N columns, B panels, W words of a column, C columns of a panel, J groups.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config.quantization import Activations
from jaxllm.ops.contraction import num_contracted
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.quantized_bytes import Bytes, RoundingSizes, byte_offset, rounding_kernel
from jaxllm.ops.cpu.quantized_kernel import PANEL, QuantizedSizes, quantized_kernel
from jaxllm.ops.cpu.quantized_numbers import Arithmetic, Codes, Floats, Pairs
from jaxllm.ops.quantized import round_activations

Rounding = Literal["never", "token", "group"]
_SCALES = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
_MANY_ROWS = 32  # rounded by several threads
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)  # inputs of a word of 4-bit codes, from its lowest bits up


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class QuantizedPanels:
    """A quantised matrix in panels, or as many as there are experts.

    Attributes:
        codes: uint32 `[B, W, C]`, of experts `[E, B, W, C]`.
        scales, minima: `[B, J, C]`, of experts `[E, B, J, C]`.
        order: int32 `[K]` or `[E, K]`: the input that each row belongs to; None: in their order.
        number: which expert, where one was chosen.
        meaning: of codes.
        remaining: the sizes of the dims that a product keeps.
        dtype: in which products are computed, bfloat16 or float32.
        rounding: whether rows of x are rounded to 8-bit integers first: never, or with a scale of each token, or of
            each token's group.
    """

    codes: jax.Array
    scales: jax.Array
    minima: jax.Array | None
    order: jax.Array | None
    number: jax.Array | None
    meaning: Codes = dataclasses.field(metadata={"static": True})
    remaining: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})
    rounding: Rounding = dataclasses.field(default="never", metadata={"static": True})

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.codes.shape[-2] * self.meaning.per_word

    @property
    def shape(self) -> tuple[int, ...]:
        """Of experts: `[E, K, remaining dims]`."""
        return (*self.codes.shape[:-3], self.num_inputs, *self.remaining)

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """Sums over the last dims of x and the inputs of the matrix: `[..., remaining dims]`, float32."""
        first = x.ndim - num_contracted(spec)
        x_MK = x.reshape(-1, self.num_inputs)
        if self.order is not None:
            x_MK = jnp.take(x_MK, self.order, axis=1)
        return _matmul(x_MK, self).reshape(*x.shape[:first], *self.remaining)

    def rows(self, index_T: jax.Array) -> jax.Array:
        """Rows `[T, K]` of a table whose inputs are its last dim."""
        scales = _columns(self.scales, index_T).astype(jnp.float32)
        numbers = _numbers(_columns(self.codes, index_T), self.meaning).reshape(*scales.shape, -1)
        values = numbers * scales[..., None]
        if self.minima is not None:
            values = values + _columns(self.minima, index_T).astype(jnp.float32)[..., None]
        return values.reshape(index_T.shape[0], -1).astype(self.dtype)

    def expert(self, number: jax.Array) -> QuantizedPanels:
        """One of the matrices: its panels are read where they lie."""
        order = None if self.order is None else self.order[number]
        return dataclasses.replace(self, number=number, order=order)


def _columns(panels: jax.Array, index_T: jax.Array) -> jax.Array:
    """`[T, ..]` of some columns, as integers and where they lie (see `jaxllm.ops.gather`)."""
    panels, index_T = jax.lax.optimization_barrier((panels, index_T))
    bits = jax.lax.bitcast_convert_type(panels, jnp.dtype(f"uint{8 * panels.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(bits[index_T // PANEL, :, index_T % PANEL], panels.dtype)


def _numbers(words: jax.Array, meaning: Codes) -> jax.Array:
    """float32 `[T, K]` of words `[T, W]`."""
    if meaning.bits == 8:
        parts = jax.lax.bitcast_convert_type(words, jnp.int8)
        return parts.reshape(words.shape[0], -1).astype(jnp.float32)
    shifts = jnp.array([4 * _EVEN_FIRST.index(i) for i in range(8)], jnp.uint32)
    codes = ((words[..., None] >> shifts) & 15).reshape(words.shape[0], -1)
    return jnp.array(meaning.table, jnp.float32)[codes]


def rounds(meaning: Codes) -> bool:
    """Whether products with rows that are rounded know such codes."""
    return byte_offset(meaning) is not None


def packs_quantized(k: int, n: int, group: int, meaning: Codes) -> bool:
    """Whether a quantised matrix can be kept in panels."""
    whole = n % PANEL == 0 and k % meaning.per_word == 0 and k % group == 0 and group % 16 == 0
    return whole and all(float(jnp.bfloat16(number)) == number for number in meaning.table)


def pack_codes(codes: np.ndarray, meaning: Codes, axis: int) -> np.ndarray:
    """uint32 `[B, W, C]` of codes, one in each byte: `[K, N]` (axis 0) or `[N, K]` (axis 1)."""
    k, n = codes.shape if axis == 0 else codes.shape[::-1]
    per_word, panels = meaning.per_word, n // PANEL
    split = (k // per_word, per_word, panels, PANEL) if axis == 0 else (panels, PANEL, k // per_word, per_word)
    codes = codes.view(np.uint8).reshape(split)
    codes = codes.transpose(2, 0, 3, 1) if axis == 0 else codes.transpose(0, 2, 1, 3)  # [B, W, C, inputs of a word]
    out = np.empty((panels, k // per_word, PANEL), np.uint32)
    parts = out.view(np.uint8).reshape(*out.shape, 4)
    for byte in range(4):
        if meaning.bits == 8:
            parts[..., byte] = codes[..., byte]
        else:
            low, high = _EVEN_FIRST[2 * byte : 2 * byte + 2]
            parts[..., byte] = codes[..., low] | (codes[..., high] << 4)
    return out


def pack_scales(scales: np.ndarray, axis: int) -> np.ndarray:
    """`[B, J, C]` of scales or minima `[J, N]` (axis 0) or `[N, J]` (axis 1)."""
    j, n = scales.shape if axis == 0 else scales.shape[::-1]
    if axis == 0:
        return np.ascontiguousarray(scales.reshape(j, n // PANEL, PANEL).swapaxes(0, 1))
    return np.ascontiguousarray(scales.reshape(n // PANEL, PANEL, j).swapaxes(1, 2))


def _matmul(x_MK: jax.Array, matrix: QuantizedPanels) -> jax.Array:
    """float32 `[M, N]`."""
    b, c = matrix.codes.shape[-3], PANEL
    m, k = x_MK.shape
    sizes = QuantizedSizes(
        m=m,
        k=k,
        num_panels=b,
        group=k // matrix.scales.shape[-2],
        codes=matrix.meaning,
        scale=_SCALES[matrix.scales.dtype.name],
        has_minima=matrix.minima is not None,
        is_chosen=matrix.number is not None,
    )
    if matrix.rounding != "never" and ffi.has("avx512vnni"):
        kind, x = "bytes", _rounded(x_MK, sizes, by_group=matrix.rounding == "group")
    elif matrix.rounding != "never":
        kind = "floats"
        to = Activations(codes="int8", by_group=matrix.rounding == "group")
        x = round_activations(x_MK, 1, to, None, sizes.group)
    else:
        kind = "pairs" if matrix.dtype == "bfloat16" and not ffi.unavailable() else "floats"
        x = x_MK.astype(matrix.dtype).astype(jnp.bfloat16 if kind == "pairs" else jnp.float32)
    number = None if matrix.number is None else matrix.number.astype(jnp.int32)
    operands = [part for part in (x, matrix.codes, matrix.scales, matrix.minima, number) if part is not None]
    result = jax.ShapeDtypeStruct((m, b * c), jnp.float32)
    return jax.ffi.ffi_call(_target(sizes, kind, ffi.has("avx512f")), result)(*operands)


def _rounded(x_MK: jax.Array, sizes: QuantizedSizes, *, by_group: bool) -> jax.Array:
    """Rows as `quantized_bytes` wants them."""
    (m, k), s = x_MK.shape, sizes
    rounding = RoundingSizes(m=m, k=k, group=s.group, by_group=by_group, codes=s.codes)
    result = jax.ShapeDtypeStruct((rounding.num_bytes,), jnp.uint8)
    return jax.ffi.ffi_call(_rounding_target(rounding), result)(x_MK.astype(jnp.float32))


@functools.cache  # every layer's trace asks again
def _target(sizes: QuantizedSizes, kind: str, is_wide: bool) -> str:
    num_parts = min(sizes.num_panels, 4 * ffi.num_threads())
    arithmetic: Arithmetic = Floats(sizes.codes, is_wide=is_wide)
    if kind != "floats":
        arithmetic = Bytes(sizes.codes) if kind == "bytes" else Pairs(sizes.codes)
    return ffi.register(quantized_kernel(sizes, arithmetic, num_parts), num_parts, num_operands=sizes.num_operands)


@functools.cache
def _rounding_target(sizes: RoundingSizes) -> str:
    num_parts = 4 * ffi.num_threads() if sizes.m >= _MANY_ROWS else 1
    return ffi.register(rounding_kernel(sizes, num_parts), num_parts, num_operands=1)
