"""What every module of the decoder is made of: parameters with named dims, products, norms, the outside world.

Dimension letters: T tokens, D model width, K key/value heads, G query heads per key/value head, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ClampedSwiglu, ModelConfig
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.contraction import contraction
from jaxllm.ops.mlp import activate
from jaxllm.ops.moe import Experts, grouped_product
from jaxllm.ops.norm import layer_norm, rms_norm
from jaxllm.ops.rope import Tables

FLOAT32 = jnp.dtype(jnp.float32)


class Attend(Protocol):
    """Write this layer's keys and values to the cache and attend.

    q `[T, K, G, H]`, kv `[T, K, 2, H]` (one row `[T, 1, 1, W]` for latent attention), sinks `[K, G]` or None.
    """

    def __call__(
        self, layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array, spec: AttentionSpec, sinks_KG: jax.Array | None
    ) -> jax.Array: ...


class StoredMatrix(Protocol):
    """A matrix that is not kept as its array; the value of an `nnx.Param` and a pytree (see `jaxllm.weights`)."""

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """The contraction of `x` with the matrix that `spec` says, accumulated in float32."""
        ...

    def rows(self, index_T: jax.Array) -> jax.Array:
        """Rows `[T, K]` of a table."""
        ...

    def columns(self, start: int, stop: int | None) -> StoredMatrix:
        """Some of what the last dim keeps."""
        ...


def contract(spec: str, x: jax.Array, weight: nnx.Param | jax.Array | StoredMatrix) -> jax.Array:
    """Matrix product in the weight's dtype, accumulated in float32."""
    w = weight.get_value() if isinstance(weight, nnx.Param) else weight
    if not isinstance(w, jax.Array):
        return w.product(spec, x)
    return _product(spec, x.astype(w.dtype), w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    return contraction(spec, x, w)


def _forward(spec: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return contraction(spec, x, w), (x, w)


def _backward(spec: str, kept: tuple[jax.Array, jax.Array], change: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Left to JAX, the change would stay float32 beside narrow weights, and both products run at float32's speed.

    XLA's CPU backend has no narrow product that sums over the rows of both sides: there it is done in float32.
    """
    x, w = kept
    left, right, out = spec.replace("->", ",").split(",")
    narrow, over_rows = change.astype(w.dtype), functools.partial(contraction, f"{left},{out}->{right}")
    change_x = contraction(f"{out},{right}->{left}", narrow, w).astype(x.dtype)
    if w.dtype == jnp.float32:
        return change_x, over_rows(x, change)
    change_w = jax.lax.platform_dependent(
        x,
        change,
        cpu=lambda x, change: over_rows(x.astype(jnp.float32), change.astype(jnp.float32)),
        default=lambda x, change: over_rows(x, change.astype(w.dtype)),
    )
    return change_x, change_w.astype(w.dtype)


_product.defvjp(_forward, _backward)


def columns(weight: nnx.Param, start: int, stop: int | None) -> jax.Array | StoredMatrix:
    """Some of what the last dim of a matrix keeps."""
    w = weight.get_value()
    return w[..., start:stop] if isinstance(w, jax.Array) else w.columns(start, stop)


class Product(Protocol):
    """A product with a named parameter (`layers.3.attention.qkv`): where an adapter adds its own."""

    def __call__(self, name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array: ...


def plain_product(name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    """See `contract`; the name changes nothing."""
    return contract(spec, x, weight)


class ExpertsProduct(Protocol):
    """The same with the matrices of all experts, for rows sorted by expert: `jaxllm.ops.moe.grouped_product`."""

    def __call__(
        self, name: str, spec: str, x_MD: jax.Array, weight: jax.Array | Experts, sizes_E: jax.Array
    ) -> jax.Array: ...


def plain_experts_product(
    name: str, spec: str, x_MD: jax.Array, weight: jax.Array | Experts, sizes_E: jax.Array
) -> jax.Array:
    """See `grouped_product`; the name changes nothing."""
    return grouped_product(spec, x_MD, weight, sizes_E)


@dataclass(frozen=True, slots=True)
class Context:
    """What one forward pass borrows from outside: attention over the cache and where things lie.

    `shard(x, *dims)` constrains an activation by its dims' names; `over_shards(f, in_dims, out_dims)` runs `f` on
    each device's own parts; `residual_dtype` is the type of the stream between blocks (and so of the all-reduced
    partial sums); `gathered(block)` is the block with the weights that it computes with; `longest` is the length of
    the longest sequence that can come, None for the model's own limit; `product(name, spec, x, weight)` multiplies with
    a block's matrices, `experts_product` with those of experts on the device that holds them; `routed(logits, experts)`
    is told what each router chose; `activate` is `ops.mlp.activate`, or what computes the same in fewer passes;
    `attend_turned(qkv, rope, spec)` rotates and attends at once, or gives None where it is not written for that layer.
    """

    attend: Attend
    shard: Callable[..., jax.Array]
    over_shards: Callable[[Callable, Sequence[tuple[str | None, ...]], tuple[str | None, ...]], Callable]
    residual_dtype: jnp.dtype
    gathered: Callable[[Any], Callable[..., jax.Array]] = lambda module: module
    longest: int | None = None
    product: Product = plain_product
    experts_product: ExpertsProduct = plain_experts_product
    routed: Callable[[jax.Array, jax.Array], None] = lambda logits_TE, expert_TY: None
    activate: Callable[[jax.Array, str, ClampedSwiglu | None], jax.Array] = activate
    attend_turned: Callable[[jax.Array, Tables, AttentionSpec], jax.Array | None] = lambda qkv_TKWH, rope, spec: None

    def to_residual(self, y_TD: jax.Array, bias: nnx.Param | None = None) -> jax.Array:
        """A half block's result in the residual type; a bias is added once, after the partial sums are."""
        y_TD = self.shard(y_TD.astype(self.residual_dtype), "residual_tokens", "model_out")
        if bias is not None:
            y_TD = y_TD + bias[...].astype(y_TD.dtype)
        return self.shard(y_TD, "residual_tokens", "model")


def param(
    shape: tuple[int, ...],
    dims: tuple[str, ...],
    dtype: jnp.dtype = FLOAT32,
    *,
    contracted: tuple[int, ...] = (),
    inputs: tuple[int, ...] | None = None,
) -> nnx.Param:
    """A parameter with its logical dims. Zeros: real values arrive from a checkpoint, never from here.

    `contracted` says which dims of a matrix (its first ones, or its last) every product sums over: such a matrix may
    be stored in the order that a kernel wants (`StoredMatrix`). `inputs` are the dims that the linear takes in, along
    which a quantised matrix has its groups; `contracted` unless told otherwise, none: it is never quantised.
    """
    assert len(shape) == len(dims), (shape, dims)
    inputs = contracted if inputs is None else inputs
    return nnx.Param(jnp.zeros(shape, dtype), dims=dims, contracted=contracted, inputs=inputs)


class Norm(nnx.Module):
    """RMS norm, or layer norm with or without its bias, over the last dim."""

    def __init__(self, cfg: ModelConfig):
        self.eps, self.is_rms = cfg.rms_norm_eps, cfg.norm == "rms"
        self.scale = param((cfg.hidden_size,), ("model",))
        self.bias = param((cfg.hidden_size,), ("model",)) if cfg.norm == "layer" else None

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        if self.is_rms:
            return rms_norm(x_TD, self.scale[...], self.eps)
        return layer_norm(x_TD, self.scale[...], None if self.bias is None else self.bias[...], self.eps)
