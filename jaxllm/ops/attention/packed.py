"""Causal attention without a cache, with a derivative: what training runs.

A flat batch whose tokens come in spans of equal length (queries, keys and values of the same tokens) -> outputs. A
span holds one document or several, end to end; a query sees its own document only. Plain XLA on every platform: the
causal part of the scores is computed in blocks of queries, and the derivative of long spans computes them again.

Dimension letters: T tokens, B spans, S tokens of a span, Q queries of a block, K key/value heads, G query heads per
key/value head, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxllm.ops.attention.metadata import AttentionSpec

_MASKED = -1e30  # finite: padding sees nothing, and must not become NaN
_BLOCK = 512  # queries whose scores exist at a time


def packed_attention(
    q_TKGH: jax.Array,
    kv_TK2H: jax.Array,
    documents_T: jax.Array | None,
    *,
    span: int,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
) -> jax.Array:
    """Attend within spans and documents.

    Args:
        q_TKGH, kv_TK2H: as `jaxllm.models.primitives.Attend` has them, T a multiple of `span`.
        documents_T: int32, the document that each token belongs to, in runs; None: a span is one document.
        span: tokens that are attended together.
        spec: scale, window, soft-cap and where the values are.
        sinks_KG: a logit per query head that takes part in the softmax and gives no value.

    Returns:
        `[T, K, G, H]` in float32; the last dim is the values' width.
    """
    num_tokens, k, g, h = q_TKGH.shape
    q = q_TKGH.reshape(-1, span, k, g, h)
    kv = kv_TK2H.reshape(-1, span, *kv_TK2H.shape[1:])
    keys, values = kv[:, :, :, 0], kv[:, :, :, -1][..., : spec.value_width]
    documents = None if documents_T is None else documents_T.reshape(-1, span)
    attend = functools.partial(_block, spec=spec, sinks_KG=sinks_KG)
    if span > _BLOCK:
        attend = jax.checkpoint(attend, static_argnums=(4, 5))
    blocks = []
    for start in range(0, span, _BLOCK):
        end = min(start + _BLOCK, span)
        first = 0 if spec.window is None else max(0, start - spec.window + 1)
        mine = None if documents is None else documents[:, first:end]
        blocks.append(attend(q[:, start:end], keys[:, first:end], values[:, first:end], mine, start, first))
    out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
    return out.reshape(num_tokens, k, g, -1)


def _block(q, keys, values, documents, start: int, first: int, *, spec: AttentionSpec, sinks_KG) -> jax.Array:
    """Queries `[B, Q, ...]` from `start` on over keys `[B, S, ...]` from `first` on, both counted in the span."""
    precision = "highest" if q.dtype == jnp.float32 else None
    scores = jnp.einsum("BQKGH,BSKH->BKGQS", q, keys, preferred_element_type=jnp.float32, precision=precision)
    scores = scores * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    seen = _seen(q.shape[1], keys.shape[1], start, first, spec.window)
    if documents is not None:
        same = documents[:, start - first :, None] == documents[:, None, :]
        seen = (seen & same)[:, None, None]
    scores = jnp.where(seen, scores, _MASKED)
    if sinks_KG is not None:
        sinks = jnp.broadcast_to(sinks_KG[None, :, :, None, None], (*scores.shape[:4], 1))
        scores = jnp.concatenate([scores, sinks.astype(scores.dtype)], axis=-1)
    shares = _softmax(scores)[..., : keys.shape[1]].astype(values.dtype)
    return jnp.einsum("BKGQS,BSKH->BQKGH", shares, values, preferred_element_type=jnp.float32, precision=precision)


def _seen(queries: int, keys: int, start: int, first: int, window: int | None) -> jax.Array:
    """Which keys `[Q, S]` come before or at a query and inside its window."""
    i, j = start + jnp.arange(queries)[:, None], first + jnp.arange(keys)
    seen = j <= i
    return seen if window is None else seen & (j > i - window)


@jax.custom_vjp
def _softmax(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scores, axis=-1)


def _forward(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    shares = _softmax(scores)
    return shares, shares


def _backward(shares: jax.Array, change: jax.Array) -> tuple[jax.Array]:
    """`p (dp - sum(p dp))`, the sum being a product: XLA's CPU backend adds up rows one element at a time."""
    ones = jnp.ones((shares.shape[-1], 1), jnp.float32)
    return (shares * (change - jnp.matmul(shares * change, ones, precision="highest")),)


_softmax.defvjp(_forward, _backward)
