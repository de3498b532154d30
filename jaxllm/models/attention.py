"""The attention half of a block: grouped heads (`Attention`) or one compressed row (`MultiHeadLatentAttention`).

Hidden states `[T, D]` and rotary tables -> `[T, D]`. Where keys and values are kept is `ctx.attend`'s business.

Dimension letters: T tokens, D model width, K key/value heads, G query heads per key/value head (N = K*G query
heads), H head width, R latent rank, W latent row (R and the rotary dims).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import LatentAttention, ModelConfig
from jaxllm.models.primitives import Context, columns, contract, param
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.norm import layer_norm, rms_norm
from jaxllm.ops.rope import Tables, apply_rope

_LATENT_EPS = 1e-6  # of the norms on compressed rows, whatever the configuration says of the others


class Attention(nnx.Module):
    """Multi-head attention with grouped key/value heads; biases, QK-norm and sinks where the family has them."""

    def __init__(self, cfg: ModelConfig, index: int, kv_copies: int, dtype: jnp.dtype):
        d, h, k = cfg.hidden_size, cfg.head_dim, cfg.num_kv_heads * kv_copies
        g = cfg.num_heads // k
        self.index, self.name = index, f"layers.{index}.attention"
        self.eps, self.qk_norm, self.interleaved = cfg.rms_norm_eps, cfg.qk_norm, cfg.rope_interleaved
        self.spec = AttentionSpec(scale=cfg.score_scale(index), window=cfg.window(index), softcap=cfg.attention_softcap)
        self.qkv = param((d, k, g + 2, h), ("model_in", "heads", "qkv", "head_dim"), dtype, contracted=(0,))
        out_dims = ("heads_in", "group", "head_dim", "model_out")
        self.out = param((k, g, h, d), out_dims, dtype, contracted=(0, 1, 2))
        self.qkv_bias = param((k, g + 2, h), ("heads", "qkv", "head_dim")) if cfg.qkv_bias else None
        self.out_bias = param((d,), ("model_out",)) if cfg.out_bias else None
        if cfg.qk_norm == "head":
            self.q_norm, self.k_norm = param((h,), ("head_dim",)), param((h,), ("head_dim",))
        elif cfg.qk_norm:
            self.q_norm = param((k, g, h), ("heads", "group", "head_dim"))
            self.k_norm = param((k, 1, h), ("heads", "group", "head_dim"))
        self.sinks = param((k, g), ("heads", "group")) if cfg.attention_sinks else None

    def __call__(self, x_TD: jax.Array, rope: Tables | None, ctx: Context) -> jax.Array:
        x_TD = ctx.shard(x_TD, "tokens", "model")
        qkv = ctx.product(f"{self.name}.qkv", "TD,DKXH->TKXH", x_TD, self.qkv)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        qkv = ctx.shard(qkv, "tokens", "heads", "qkv", "head_dim")
        out = ctx.shard(self._attended(qkv, rope, ctx), "tokens", "heads_in", "group", "head_dim")
        return ctx.to_residual(ctx.product(f"{self.name}.out", "TKGH,KGHD->TD", out, self.out), self.out_bias)

    def _attended(self, qkv: jax.Array, rope: Tables | None, ctx: Context) -> jax.Array:
        """`[T, K, G + 2, H]` -> `[T, K, G, H]`."""
        is_plain = self.qk_norm is None and self.sinks is None and not self.interleaved
        if rope is not None and is_plain and (out := ctx.attend_turned(qkv, rope, self.spec)) is not None:
            return out
        turning, value = self._normed(qkv[:, :, :-1]), qkv[:, :, -1:]
        if rope is not None:
            turning = apply_rope(turning, rope, interleaved=self.interleaved)
        q_TKGH, kv_TK2H = turning[:, :, :-1], jnp.concatenate([turning[:, :, -1:], value], axis=2)
        sinks = None if self.sinks is None else self.sinks[...]
        return ctx.attend(self.index, q_TKGH, kv_TK2H, self.spec, sinks)

    def _normed(self, qk: jax.Array) -> jax.Array:
        """Norm over each head, or over all heads of a token (repeated key heads leave their mean as it is)."""
        if self.qk_norm is None:
            return qk
        if self.qk_norm == "head_layer":
            q = layer_norm(qk[:, :, :-1], self.q_norm[...], None, self.eps)
            return jnp.concatenate([q, layer_norm(qk[:, :, -1:], self.k_norm[...], None, self.eps)], axis=2)
        axes = -1 if self.qk_norm == "head" else (1, 2, 3)
        q = rms_norm(qk[:, :, :-1], self.q_norm[...], self.eps, axes)
        return jnp.concatenate([q, rms_norm(qk[:, :, -1:], self.k_norm[...], self.eps, axes)], axis=2)


class MultiHeadLatentAttention(nnx.Module):
    """DeepSeek-V2's attention, absorbed: the cache keeps one row of `kv_rank + rope_dim` per token.

    Keys are `c W_UK` and values `c W_UV` of the compressed row `c`. Instead of expanding rows, queries go into the
    compressed space (`q W_UK^T`) and outputs come back from it (`o W_UV`): attention of N query heads over one
    key/value head whose values are the first R columns of its keys.
    """

    def __init__(self, cfg: ModelConfig, index: int, dtype: jnp.dtype):
        assert cfg.latent is not None
        a: LatentAttention = cfg.latent
        self.index, self.name = index, f"layers.{index}.attention"
        self.dims, self.interleaved = a, cfg.rope_interleaved
        d, n, width = cfg.hidden_size, cfg.num_heads, a.nope_dim + a.rope_dim
        self.spec = AttentionSpec(
            scale=cfg.score_scale(index), softcap=cfg.attention_softcap, window=cfg.window(index), value_width=a.kv_rank
        )
        if a.q_rank is None:
            self.query = param((d, n, width), ("model_in", "heads", "head_dim"), dtype, contracted=(0,))
        else:
            self.q_down = param((d, a.q_rank), ("model_in", "latent"), dtype, contracted=(0,))
            self.q_norm = param((a.q_rank,), ("latent",))
            self.query = param((a.q_rank, n, width), ("latent", "heads", "head_dim"), dtype, contracted=(0,))
        self.kv_down = param((d, a.cache_width), ("model_in", "latent"), dtype, contracted=(0,))
        self.kv_norm = param((a.kv_rank,), ("latent",))
        up = (a.kv_rank, n, a.nope_dim + a.value_dim)
        self.kv_up = param(up, ("latent", "heads", "head_dim"), dtype, inputs=(0,))
        self.out = param((n, a.value_dim, d), ("heads_in", "head_dim", "model_out"), dtype, contracted=(0, 1))

    def __call__(self, x_TD: jax.Array, rope: Tables | None, ctx: Context) -> jax.Array:
        assert rope is not None, "latent attention has rotary dims"
        a = self.dims
        x_TD = ctx.shard(x_TD, "tokens", "model")
        row_TW = ctx.product(f"{self.name}.kv_down", "TD,DW->TW", x_TD, self.kv_down)
        c_TR = rms_norm(row_TW[:, : a.kv_rank], self.kv_norm[...], _LATENT_EPS)
        turned = apply_rope(row_TW[:, a.kv_rank :], rope, interleaved=self.interleaved)
        kv = jnp.concatenate([c_TR, turned], axis=-1)[:, None, None]

        q_TNH = ctx.shard(self._queries(x_TD, ctx), "tokens", "heads", "head_dim")
        keys, values = columns(self.kv_up, 0, a.nope_dim), columns(self.kv_up, a.nope_dim, None)
        absorbed = contract("TNH,RNH->TNR", q_TNH[..., : a.nope_dim], keys)
        turned_TNH = apply_rope(q_TNH[..., a.nope_dim :], rope, interleaved=self.interleaved)
        q_TNW = jnp.concatenate([absorbed, turned_TNH], axis=-1)

        latent_TNR = ctx.attend(self.index, q_TNW[:, None], kv, self.spec, None)[:, 0]
        out_TNH = ctx.shard(contract("TNR,RNH->TNH", latent_TNR, values), "tokens", "heads_in", "head_dim")
        return ctx.to_residual(ctx.product(f"{self.name}.out", "TNH,NHD->TD", out_TNH, self.out))

    def _queries(self, x_TD: jax.Array, ctx: Context) -> jax.Array:
        if self.dims.q_rank is None:
            return ctx.product(f"{self.name}.query", "TD,DNH->TNH", x_TD, self.query)
        c_TR = rms_norm(
            ctx.product(f"{self.name}.q_down", "TD,DR->TR", x_TD, self.q_down), self.q_norm[...], _LATENT_EPS
        )
        return ctx.product(f"{self.name}.query", "TR,RNH->TNH", c_TR, self.query)
