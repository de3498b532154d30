"""What a single CPU device computes by kernels of its own while training, for the layers they are written for.

Everything else, and every mesh, runs plain XLA: each function falls back by itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ClampedSwiglu
from jaxllm.models.primitives import Product, contract, plain_product
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.cpu import ffi, row_product, span_attention, swiglu
from jaxllm.ops.mlp import activate
from jaxllm.ops.rope import Tables
from jaxllm.sharding.mesh import Placement
from jaxllm.training.batch import TokenBatch


def context_fields(placement: Placement, batch: TokenBatch, span: int) -> dict[str, Any]:
    """Fields of `Context` that are not as they are by default; none where there are no kernels."""
    if not _runs_on(placement) or ffi.unavailable(quantized=True):
        return {}

    def attend_turned(qkv_TKWH: jax.Array, rope: Tables, spec: AttentionSpec) -> jax.Array | None:
        if not span_attention.takes(qkv_TKWH, rope, spec, span):
            return None
        return span_attention.span_attention(qkv_TKWH, rope, batch.documents, span=span, scale=spec.scale)

    return {"attend_turned": attend_turned, "activate": _activate}


def _runs_on(placement: Placement) -> bool:
    return placement.mesh.size == 1 and placement.mesh.devices.flat[0].platform == "cpu"


def _activate(h_TXF: jax.Array, name: str, clamped: ClampedSwiglu | None) -> jax.Array:
    is_swiglu = name == "silu" and clamped is None and swiglu.takes(h_TXF)
    return swiglu.swiglu(h_TXF) if is_swiglu else activate(h_TXF, name, clamped)


def trained_product(placement: Placement) -> Product:
    """`plain_product`, but the derivative by a bfloat16 matrix is a product in bfloat16 too."""
    return _narrow_product if _runs_on(placement) and not ffi.unavailable() else plain_product


def _narrow_product(name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    w = weight.get_value()
    is_narrow = isinstance(w, jax.Array) and w.dtype == jnp.bfloat16
    return _product(spec, x.astype(w.dtype), w) if is_narrow else plain_product(name, spec, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return contract(spec, x, w)


def _forward(spec: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return contract(spec, x, w), (x, w)


def _backward(spec: str, kept: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `contract` has it, but for the product over rows. The matrix's first dims are those that are summed over."""
    x, w = kept
    x_TK, change_TN = x.reshape(-1, math.prod(x.shape[1:])), change.reshape(x.shape[0], -1)
    change_x = jax.vjp(lambda x: contract(spec, x, w), x)[1](change)[0]
    if row_product.takes(x_TK, change_TN):
        return change_x, row_product.row_product(x_TK, change_TN).reshape(w.shape).astype(w.dtype)
    return change_x, jax.vjp(lambda w: contract(spec, x, w), w)[1](change)[0]


_product.defvjp(_forward, _backward)
