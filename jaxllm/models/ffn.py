"""The feed-forward half of a block: dense (`FeedForward`) or a mixture of experts (`MixtureOfExperts`).

Hidden states `[T, D]` -> `[T, D]`.

Dimension letters: T tokens, D model width, F feed-forward width, X one or two products (gate, up), E experts, M
routed rows (T times experts per token), Y experts per token, A parts of a sum over devices that hold experts, B
parts of a sum over devices that cut F.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.config import ModelConfig
from jaxllm.models.primitives import Context, contract, param
from jaxllm.ops.mlp import activate
from jaxllm.ops.moe import route, sort_by_expert


class FeedForward(nnx.Module):
    """Widen, activate (with a gate where the family has one), narrow."""

    def __init__(self, cfg: ModelConfig, size: int, dtype: jnp.dtype, name: str):
        self.name = name
        d, ups = cfg.hidden_size, 2 if cfg.gated else 1
        self.activation, self.clamped = cfg.activation, cfg.clamped_swiglu
        self.gate_up = param((d, ups, size), ("model_in", "gate_up", "ffn"), dtype, contracted=(0,))
        self.down = param((size, d), ("ffn_in", "model_out"), dtype, contracted=(0,))
        self.gate_up_bias = param((ups, size), ("gate_up", "ffn")) if cfg.mlp_bias else None
        self.down_bias = param((d,), ("model_out",)) if cfg.mlp_bias else None

    def __call__(self, x_TD: jax.Array, ctx: Context) -> jax.Array:
        x_TD = ctx.shard(x_TD, "ffn_tokens", "model")
        h_TXF = ctx.product(f"{self.name}.gate_up", "TD,DXF->TXF", x_TD, self.gate_up)
        if self.gate_up_bias is not None:
            h_TXF = h_TXF + self.gate_up_bias[...]
        h_TXF = ctx.shard(h_TXF, "ffn_tokens", "gate_up", "ffn")
        h_TF = ctx.shard(ctx.activate(h_TXF, self.activation, self.clamped), "ffn_tokens", "ffn_in")
        return ctx.to_residual(ctx.product(f"{self.name}.down", "TF,FD->TD", h_TF, self.down), self.down_bias)


class MixtureOfExperts(nnx.Module):
    """Each token goes to the experts its router chooses, and to the shared one where there is one.

    Every device sorts the rows of the experts it holds and multiplies only those; the parts of the sum are added
    over the mesh by XLA, as everywhere else.
    """

    def __init__(self, cfg: ModelConfig, dtype: jnp.dtype, name: str):
        assert cfg.experts is not None
        e, self.name = cfg.experts, name
        self.cfg = e
        d, f, ups = cfg.hidden_size, e.ffn_size, 2 if cfg.gated else 1
        self.activation, self.clamped = cfg.activation, cfg.clamped_swiglu
        self.router = param((d, e.num_experts), ("model", "router"))  # float32: a choice must not hang on rounding
        self.correction = param((e.num_experts,), ("router",)) if e.correction_bias else None
        self.gate_up = param((e.num_experts, d, ups, f), ("experts", "model_in", "gate_up", "ffn"), dtype, inputs=(1,))
        self.down = param((e.num_experts, f, d), ("experts", "ffn_in", "model_out"), dtype, inputs=(1,))
        if e.bias:
            self.router_bias = param((e.num_experts,), ("router",))
            self.gate_up_bias = param((e.num_experts, ups, f), ("experts", "gate_up", "ffn"))
            self.down_bias = param((e.num_experts, d), ("experts", "model_out"))
        self.shared = FeedForward(cfg, e.shared_size, dtype, f"{name}.shared") if e.shared_size else None
        self.shared_gate = param((d, 1), ("model", "router")) if e.shared_gate else None

    def __call__(self, x_TD: jax.Array, ctx: Context) -> jax.Array:
        routed_TD = ctx.shard(x_TD, "expert_tokens", "model")
        logits_TE = contract("TD,DE->TE", routed_TD, self.router)
        if self.cfg.bias:
            logits_TE = logits_TE + self.router_bias[...]
        correction = None if self.correction is None else self.correction[...]
        expert_TY, weight_TY = route(logits_TE, self.cfg, correction)
        ctx.routed(logits_TE, expert_TY)
        y_TD = ctx.to_residual(self._routed(routed_TD, expert_TY, weight_TY, ctx))
        if self.shared is None:
            return y_TD
        shared_TD = self.shared(x_TD, ctx)
        if self.shared_gate is not None:
            gate_T1 = jax.nn.sigmoid(contract("TD,DG->TG", x_TD, self.shared_gate))
            shared_TD = shared_TD * gate_T1.astype(shared_TD.dtype)
        return y_TD + shared_TD

    def _routed(self, x_TD: jax.Array, expert_TY: jax.Array, weight_TY: jax.Array, ctx: Context) -> jax.Array:
        """Two stages, because rules may cut F differently in and out; between them lies a sharding constraint."""
        ids_E = jnp.arange(self.cfg.num_experts)
        biases = (self.gate_up_bias[...], self.down_bias[...]) if self.cfg.bias else (None, None)
        tokens, choices = ("expert_tokens", None), ("expert_tokens", None)
        widen = ctx.over_shards(
            functools.partial(self._widen, ctx),
            (tokens, choices, ("experts",), ("experts", "model_in", "gate_up", "ffn"), ("experts", "gate_up", "ffn")),
            ("experts", "expert_tokens", "ffn"),
        )
        h_AMF = widen(x_TD, expert_TY, ids_E, self.gate_up.get_value(), biases[0])
        h_AMF = ctx.shard(h_AMF, "experts", "expert_tokens", "ffn_in")
        narrow = ctx.over_shards(
            functools.partial(self._narrow, ctx),
            (
                ("experts", "expert_tokens", "ffn_in"),
                choices,
                choices,
                ("experts",),
                ("experts", "ffn_in", "model_out"),
            ),
            ("experts", "ffn_in", "expert_tokens", "model_out"),
        )
        y_ABTD = narrow(h_AMF, expert_TY, weight_TY, ids_E, self.down.get_value())
        y_TD = jnp.sum(y_ABTD, axis=(0, 1))
        if biases[1] is not None:
            chosen = jax.nn.one_hot(expert_TY, self.cfg.num_experts, dtype=jnp.float32)
            y_TD = y_TD + jnp.einsum("TYE,TY,ED->TD", chosen, weight_TY, biases[1], precision="highest")
        return y_TD

    def _widen(self, ctx: Context, x_TD, expert_TY, ids_E, w_EDXF, bias_EXF) -> jax.Array:
        num_local = w_EDXF.shape[0]
        order, _, sizes = sort_by_expert(expert_TY, ids_E[0], num_local)
        rows_MD = x_TD[order // expert_TY.shape[1]]
        h_MXF = ctx.experts_product(f"{self.name}.gate_up", "MD,DXF->MXF", rows_MD, w_EDXF, sizes)
        if bias_EXF is not None:
            local_M = jnp.clip(expert_TY.reshape(-1)[order] - ids_E[0], 0, num_local - 1)
            h_MXF = h_MXF + bias_EXF[local_M]
        return activate(h_MXF, self.activation, self.clamped)[None]

    def _narrow(self, ctx: Context, h_AMF, expert_TY, weight_TY, ids_E, w_EFD) -> jax.Array:
        num_tokens, per_token = expert_TY.shape
        _, place, sizes = sort_by_expert(expert_TY, ids_E[0], w_EFD.shape[0])
        y_MD = ctx.experts_product(f"{self.name}.down", "MF,FD->MD", h_AMF[0], w_EFD, sizes)[place]
        y_TYD = y_MD.reshape(num_tokens, per_token, -1)
        return jnp.einsum("TYD,TY->TD", y_TYD, weight_TY, precision="highest")[None, None]
