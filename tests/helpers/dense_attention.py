"""Causal attention over one sequence without any cache, written the plain way: an oracle, and what a loss needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.models.decoder import Context
from jaxllm.ops.attention import AttentionSpec


def dense_attend(
    layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array, spec: AttentionSpec, sinks_KG: jax.Array | None
) -> jax.Array:
    """See `jaxllm.models.primitives.Attend`."""
    key_TKH, value_TKH = kv_TK2H[:, :, 0], kv_TK2H[:, :, -1][..., : spec.value_width]
    scores = jnp.einsum("TKGH,SKH->KGTS", q_TKGH, key_TKH, precision="highest") * spec.scale
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    i, j = jnp.arange(q_TKGH.shape[0])[:, None], jnp.arange(q_TKGH.shape[0])
    seen = (j <= i) & (j > i - (spec.window or q_TKGH.shape[0]))
    scores = jnp.where(seen, scores, -1e30)
    if sinks_KG is not None:
        sinks = jnp.broadcast_to(sinks_KG[:, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1)[..., : q_TKGH.shape[0]]
    return jnp.einsum("KGTS,SKH->TKGH", shares, value_TKH, precision="highest")


def dense_context(longest: int | None = None) -> Context:
    """A forward pass on one device, in float32, without a cache; `longest` as in `Context`."""
    whole = jnp.dtype(jnp.float32)
    return Context(dense_attend, lambda x, *_: x, lambda function, *_: function, whole, longest=longest)
