"""Rotary positions and causal attention within spans, and their derivative: what training runs on a CPU.

The joined projections of a block `[T, K, G + 2, H]` (queries, key, value of each key/value head) -> outputs
`[T, K, G, H]`; the derivative goes back to the projections. A part of the work is one span and one key/value head:
nothing of the size of the scores leaves the processor's caches, and queries, keys and values are never cut out of the
projections. Plain XLA is in `jaxllm.ops.attention.packed`.

Dimension letters: T tokens, S tokens of a span, K key/value heads, G query heads per key/value head, H head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.attention.metadata import AttentionSpec
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.span_kernel import Shape, kernel
from jaxllm.ops.rope import Tables

_MOST_NUMBERS = 1 << 17  # of a head's keys in a span: what a part keeps of them several times


def takes(qkv_TKWH: jax.Array, rope: Tables, spec: AttentionSpec, span: int) -> bool:
    """Whether the kernel is written for a layer: every dim turns, and a query sees all that came before it."""
    width = qkv_TKWH.shape[-1]
    is_plain = spec.window is None and spec.softcap is None and spec.value_width in (None, width)
    fits = width % 32 == 0 and span % 16 == 0 and span * width <= _MOST_NUMBERS
    return is_plain and fits and 2 * rope[0].shape[-1] == width and qkv_TKWH.dtype == jnp.float32


def span_attention(
    qkv_TKWH: jax.Array, rope: Tables, documents_T: jax.Array | None, *, span: int, scale: float
) -> jax.Array:
    """Turn queries and keys, and attend; of what `takes` says.

    Args:
        qkv_TKWH: float32, T a multiple of `span`.
        rope: cos and sin, each float32 `[T, H/2]`; they get no derivative.
        documents_T: int32, in runs: a token sees its own document; None: a span is one document.
        span: tokens that are attended together.
        scale: of scores.

    Returns:
        float32 `[T, K, G, H]`.
    """
    if documents_T is None:
        documents_T = jnp.zeros(qkv_TKWH.shape[0], jnp.int32)
    cos, sin = map(jax.lax.stop_gradient, rope)
    return _attend(qkv_TKWH, cos, sin, documents_T, span, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(qkv: jax.Array, cos: jax.Array, sin: jax.Array, documents: jax.Array, span: int, scale: float) -> jax.Array:
    t, k, w, h = qkv.shape
    name = _target(qkv.shape, span, scale, derivative=False)
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((t, k, w - 2, h), jnp.float32))(qkv, cos, sin, documents)


def _forward(qkv: jax.Array, cos: jax.Array, sin: jax.Array, documents: jax.Array, span: int, scale: float):
    return _attend(qkv, cos, sin, documents, span, scale), (qkv, cos, sin, documents)


def _backward(span: int, scale: float, kept: tuple[jax.Array, ...], change: jax.Array):
    qkv, cos, sin, documents = kept
    name = _target(qkv.shape, span, scale, derivative=True)
    change_qkv = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(qkv.shape, jnp.float32))(*kept, change)
    return change_qkv, jnp.zeros_like(cos), jnp.zeros_like(sin), np.zeros(documents.shape, jax.dtypes.float0)


_attend.defvjp(_forward, _backward)


@functools.cache  # every layer's trace asks again
def _target(shape: tuple[int, ...], span: int, scale: float, *, derivative: bool) -> str:
    t, k, w, h = shape
    text = kernel(Shape(span, k, w - 2, h, scale * math.log2(math.e), scale), derivative=derivative)
    return ffi.register(text, t // span * k, num_operands=5 if derivative else 4)
