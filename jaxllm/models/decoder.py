"""The decoder: one Flax NNX module tree for every family.

Token ids `[T]` and positions `[T]` of one flat ragged batch -> hidden states `[T, D]`. It names the dims of
every parameter and activation; which mesh axis a dim lies on is `jaxllm.sharding`'s business, and what a
request, a page or an iteration is, is the business of the `attend` function that the engine passes in.

Dimension letters: T tokens, D model, F feed-forward, K key/value heads, G query heads per key/value head
(N = K*G query heads), H head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.ops.norm import rms_norm
from jaxllm.ops.rope import apply_rope, inverse_frequencies, rope_tables


class Attend(Protocol):
    """Write this layer's keys and values to the cache and attend: q `[T, K, G, H]`, kv `[T, K, 2, H]`."""

    def __call__(self, layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array) -> jax.Array: ...


@dataclass(frozen=True, slots=True)
class Context:
    """What one forward pass borrows from outside: attention over the cache and sharding constraints.

    `shard(x, *dims)` constrains an activation by its dims' names; `residual_dtype` is the type of the stream
    between blocks (and so of the all-reduced partial sums).
    """

    attend: Attend
    shard: Callable[..., jax.Array]
    residual_dtype: jnp.dtype


def param(shape: tuple[int, ...], dims: tuple[str, ...], dtype: jnp.dtype) -> nnx.Param:
    """A parameter with its logical dims. Zeros: real values arrive from a checkpoint, never from here."""
    assert len(shape) == len(dims), (shape, dims)
    return nnx.Param(jnp.zeros(shape, dtype), dims=dims)


def contract(spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
    """Matrix product in the weight's dtype, accumulated in float32."""
    w = weight[...]
    precision = "highest" if w.dtype == jnp.float32 else None  # float32 means float32 on every backend
    return jnp.einsum(spec, x.astype(w.dtype), w, preferred_element_type=jnp.float32, precision=precision)


def _look_up(table_VD: jax.Array, tokens_T: jax.Array) -> jax.Array:
    """Rows of the embedding. XLA's CPU backend gathers bfloat16 by converting the table first, and moves that out
    of a decode loop, where it is no longer fused: hence gather integers, behind a barrier that keeps it inside.
    """
    table_VD, tokens_T = jax.lax.optimization_barrier((table_VD, tokens_T))
    bits = jnp.dtype(f"uint{8 * table_VD.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table_VD, bits)[tokens_T], table_VD.dtype)


class Block(nnx.Module):
    """Norm, attention, residual; norm, gated FFN, residual: two widen-narrow pairs of matrices."""

    def __init__(self, cfg: ModelConfig, index: int, kv_copies: int, dtype: jnp.dtype):
        d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
        k = cfg.num_kv_heads * kv_copies
        g = cfg.num_heads // k
        self.index = index
        self.eps = cfg.rms_norm_eps
        self.attention_norm = param((d,), ("model",), jnp.dtype(jnp.float32))
        self.qkv = param((d, k, g + 2, h), ("model_in", "heads", "qkv", "head_dim"), dtype)
        self.out = param((k, g, h, d), ("heads_in", "group", "head_dim", "model_out"), dtype)
        self.ffn_norm = param((d,), ("model",), jnp.dtype(jnp.float32))
        self.gate_up = param((d, 2, f), ("model_in", "gate_up", "ffn"), dtype)
        self.down = param((f, d), ("ffn_in", "model_out"), dtype)

    def __call__(self, x_TD: jax.Array, rope: tuple[jax.Array, jax.Array], ctx: Context) -> jax.Array:
        x_TD = x_TD + self._attention(rms_norm(x_TD, self.attention_norm[...], self.eps), rope, ctx)
        return x_TD + self._ffn(rms_norm(x_TD, self.ffn_norm[...], self.eps), ctx)

    def _attention(self, x_TD: jax.Array, rope: tuple[jax.Array, jax.Array], ctx: Context) -> jax.Array:
        qkv = ctx.shard(contract("TD,DKXH->TKXH", x_TD, self.qkv), "tokens", "heads", "qkv", "head_dim")
        rotated, value = apply_rope(qkv[:, :, :-1], rope), qkv[:, :, -1:]
        q_TKGH, kv_TK2H = rotated[:, :, :-1], jnp.concatenate([rotated[:, :, -1:], value], axis=2)
        out = ctx.attend(self.index, q_TKGH, kv_TK2H)
        out = ctx.shard(out, "tokens", "heads_in", "group", "head_dim")
        return self._to_residual(contract("TKGH,KGHD->TD", out, self.out), ctx)

    def _ffn(self, x_TD: jax.Array, ctx: Context) -> jax.Array:
        h_T2F = ctx.shard(contract("TD,DXF->TXF", x_TD, self.gate_up), "tokens", "gate_up", "ffn")
        h_TF = ctx.shard(jax.nn.silu(h_T2F[:, 0]) * h_T2F[:, 1], "tokens", "ffn_in")
        return self._to_residual(contract("TF,FD->TD", h_TF, self.down), ctx)

    def _to_residual(self, y_TD: jax.Array, ctx: Context) -> jax.Array:
        y_TD = ctx.shard(y_TD.astype(ctx.residual_dtype), "tokens", "model_out")
        return ctx.shard(y_TD, "tokens", "model")


class Decoder(nnx.Module):
    """Embedding, `L` blocks, final norm and LM head.

    Args:
        cfg: the model's mathematics.
        kv_copies: how often each key/value head is repeated so that heads divide by the mesh (GQA with tp > K).
        vocab_padding: extra vocabulary rows so that the tables divide by the mesh; their logits are -inf.
        dtype: of the matrices; norms are float32.
    """

    def __init__(self, cfg: ModelConfig, *, kv_copies: int = 1, vocab_padding: int = 0, dtype: jnp.dtype):
        self.cfg = cfg
        self.kv_copies = kv_copies
        table = (cfg.vocab_size + vocab_padding, cfg.hidden_size)
        self.embedding = param(table, ("vocab", "model"), dtype)
        self.layers = nnx.List([Block(cfg, i, kv_copies, dtype) for i in range(cfg.num_layers)])
        self.final_norm = param((cfg.hidden_size,), ("model",), jnp.dtype(jnp.float32))
        if not cfg.tie_word_embeddings:
            self.lm_head = param(table, ("vocab", "model"), dtype)

    def __call__(self, tokens_T: jax.Array, positions_T: jax.Array, ctx: Context) -> jax.Array:
        """Hidden states before the final norm, `[T, D]`."""
        x_TD = ctx.shard(_look_up(self.embedding[...], tokens_T).astype(ctx.residual_dtype), "tokens", "model")
        inv_freq = inverse_frequencies(self.cfg.head_dim, self.cfg.rope_theta, self.cfg.rope_scaling)
        rope = rope_tables(positions_T, inv_freq)
        for block in self.layers:
            with jax.named_scope(f"block_{block.index}"):
                x_TD = block(x_TD, rope, ctx)
        return x_TD

    def normed(self, x_RD: jax.Array) -> jax.Array:
        """The final norm, of what `__call__` returned."""
        return rms_norm(x_RD, self.final_norm[...], self.cfg.rms_norm_eps)

    def logits(self, x_RD: jax.Array, shard: Callable[..., jax.Array]) -> jax.Array:
        """Final norm and LM head on the rows that sample: float32 `[R, V]` (padding columns cut off)."""
        table = self.embedding if self.cfg.tie_word_embeddings else self.lm_head
        logits_RV = shard(contract("RD,VD->RV", self.normed(x_RD), table), "rows", "vocab")
        return shard(logits_RV, "rows", None)[:, : self.cfg.vocab_size]
