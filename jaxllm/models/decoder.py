"""The decoder: one Flax NNX module tree for every family.

Token ids `[T]` and positions `[T]` of one flat ragged batch -> hidden states `[T, D]`. It names the dims of
every parameter and activation; which mesh axis a dim lies on is `jaxllm.sharding`'s business, and what a
request, a page or an iteration is, is the business of the `attend` function that the engine passes in.

Dimension letters: T tokens, D model width, R rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig, Rope
from jaxllm.models.attention import Attention, MultiHeadLatentAttention
from jaxllm.models.ffn import FeedForward, MixtureOfExperts
from jaxllm.models.primitives import Attend, Context, Norm, StoredMatrix, contract, param
from jaxllm.ops.gather import gather_rows
from jaxllm.ops.rope import Tables, rope_tables

__all__ = ["Attend", "Block", "Context", "Decoder"]


def _look_up(table: jax.Array | StoredMatrix, tokens_T: jax.Array) -> jax.Array:
    """Rows of the embedding."""
    return gather_rows(table, tokens_T) if isinstance(table, jax.Array) else table.rows(tokens_T)


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual around it and a norm before it, after it, or both; or side by
    side on one normed input (`parallel_block`)."""

    def __init__(self, cfg: ModelConfig, index: int, kv_copies: int, dtype: jnp.dtype):
        self.index, self.is_parallel, self.scale = index, cfg.parallel_block, cfg.residual_scale
        self.attention_norm = Norm(cfg) if cfg.pre_norm else None
        self.ffn_norm = Norm(cfg) if cfg.pre_norm and not cfg.parallel_block else None
        self.attention_post_norm = Norm(cfg) if cfg.post_norm else None
        self.ffn_post_norm = Norm(cfg) if cfg.post_norm else None
        if cfg.latent:
            self.attention = MultiHeadLatentAttention(cfg, index, dtype)
        else:
            self.attention = Attention(cfg, index, kv_copies, dtype)
        if cfg.is_routed(index):
            self.ffn = MixtureOfExperts(cfg, dtype, f"layers.{index}.ffn")
        else:
            self.ffn = FeedForward(cfg, cfg.intermediate_size, dtype, f"layers.{index}.ffn")

    def __call__(self, x_TD: jax.Array, rope: Tables | None, ctx: Context) -> jax.Array:
        normed_TD = _maybe(self.attention_norm, x_TD)
        y_TD = self.attention(normed_TD, rope, ctx)
        if self.is_parallel:
            return x_TD + _scaled(y_TD + self.ffn(normed_TD, ctx), self.scale)
        x_TD = x_TD + _scaled(_maybe(self.attention_post_norm, y_TD), self.scale)
        y_TD = self.ffn(_maybe(self.ffn_norm, x_TD), ctx)
        return x_TD + _scaled(_maybe(self.ffn_post_norm, y_TD), self.scale)


def _scaled(x_TD: jax.Array, scale: float) -> jax.Array:
    return x_TD if scale == 1.0 else x_TD * jnp.asarray(scale, x_TD.dtype)


def _maybe(norm: Norm | None, x_TD: jax.Array) -> jax.Array:
    return x_TD if norm is None else norm(x_TD)


class Decoder(nnx.Module):
    """Embedding, `L` blocks, final norm and LM head.

    Args:
        cfg: the model's mathematics.
        kv_copies: how often each key/value head is repeated so that heads divide by the mesh (GQA with tp > K).
        vocab_padding: extra vocabulary rows so that the tables divide by the mesh; their logits are cut off.
        dtype: of the matrices; norms, biases and routers are float32.
    """

    def __init__(self, cfg: ModelConfig, *, kv_copies: int = 1, vocab_padding: int = 0, dtype: jnp.dtype):
        self.cfg = cfg
        self.kv_copies = kv_copies
        table = (cfg.vocab_size + vocab_padding, cfg.hidden_size)
        self.embedding = param(
            table, ("vocab", "model"), dtype, contracted=(1,) if cfg.tie_word_embeddings else (), inputs=(1,)
        )
        if cfg.learned_positions:
            self.positions = param((cfg.max_position_embeddings, cfg.hidden_size), ("positions", "model"), dtype)
        self.layers = nnx.List([Block(cfg, i, kv_copies, dtype) for i in range(cfg.num_layers)])
        self.final_norm = Norm(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = param(table, ("vocab", "model"), dtype, contracted=(1,))

    def __call__(self, tokens_T: jax.Array, positions_T: jax.Array, ctx: Context) -> jax.Array:
        """Hidden states before the final norm, `[T, D]`."""
        x_TD = self.embed(tokens_T, positions_T, ctx.residual_dtype)
        x_TD = ctx.shard(x_TD, "residual_tokens", "model")
        ropes = [self.cfg.rope(i) for i in range(self.cfg.num_layers)]
        tables = {rope: rope and self._tables(positions_T, rope, ctx) for rope in set(ropes)}
        for block, rope in zip(self.layers, ropes, strict=True):
            with jax.named_scope(f"block_{block.index}"):
                x_TD = ctx.gathered(block)(x_TD, tables[rope], ctx)
        return x_TD

    def embed(self, tokens_T: jax.Array, positions_T: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """What the first block gets, `[T, D]`."""
        x_TD = _look_up(self.embedding.get_value(), tokens_T).astype(dtype)
        x_TD = _scaled(x_TD, self.cfg.embedding_scale)
        if self.cfg.learned_positions:
            x_TD = x_TD + self.positions[positions_T].astype(x_TD.dtype)
        return x_TD

    def _tables(self, positions_T: jax.Array, rope: Rope, ctx: Context) -> Tables:
        cos, sin = rope_tables(positions_T, rope, ctx.longest or self.cfg.max_position_embeddings)
        return ctx.shard(cos, "tokens", None), ctx.shard(sin, "tokens", None)

    def normed(self, x_RD: jax.Array) -> jax.Array:
        """The final norm, of what `__call__` returned."""
        return self.final_norm(x_RD)

    def logits(self, x_RD: jax.Array, shard: Callable[..., jax.Array]) -> jax.Array:
        """Final norm and LM head on the rows that sample: float32 `[R, V]` (padding columns cut off)."""
        table = self.embedding if self.cfg.tie_word_embeddings else self.lm_head
        logits_RV = shard(contract("RD,VD->RV", self.normed(x_RD), table), "rows", "vocab")
        logits_RV = _scaled(shard(logits_RV, "rows", None)[:, : self.cfg.vocab_size], self.cfg.logit_scale)
        if (cap := self.cfg.final_softcap) is not None:
            logits_RV = cap * jnp.tanh(logits_RV / cap)
        return logits_RV
