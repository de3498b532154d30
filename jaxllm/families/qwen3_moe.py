"""Qwen3-MoE: Qwen3 with a mixture of many small experts in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import LocalAttention, ModelConfig, RoutedExperts
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Qwen3-MoE configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    experts = RoutedExperts(
        num_experts=fields.size("num_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=fields.size("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
        dense_layers=dense_layers(fields, sizes["num_layers"]),
    )
    bias = fields.flag("attention_bias")
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        activation=fields.activation(),
        local=_local(fields, sizes["num_layers"]),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        experts=experts,
    )
    fields.done()
    return cfg


def dense_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers without experts: those listed, and those that `decoder_sparse_step` skips."""
    step, listed = fields.size("decoder_sparse_step", 1), fields.layers("mlp_only_layers")
    return tuple(i for i in range(num_layers) if i in listed or (i + 1) % step)


def _local(fields: Fields, num_layers: int) -> LocalAttention | None:
    """`use_sliding_window` switches the window on in every layer, unlike in Qwen2 and Qwen3."""
    if fields.flag("use_sliding_window"):
        return fields.local(num_layers, range(num_layers))
    fields.skip("sliding_window")
    return None


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with a router and one FFN per expert in the routed layers."""
    result = llama.weight_map(cfg, copies)
    for i in range(cfg.num_layers):
        if cfg.is_routed(i):
            for name in ("gate_up", "down"):
                del result["layers", i, "ffn", name]
            result |= experts(cfg, i)
    return result


def experts(cfg: ModelConfig, layer: int) -> WeightMap:
    """Router and experts of one layer, named as Qwen and DeepSeek do."""
    assert cfg.experts is not None
    x = cfg.experts
    path, name = ("layers", layer, "ffn"), f"model.layers.{layer}.mlp"
    result: WeightMap = {
        (*path, "router"): weights.transposed(f"{name}.gate.weight", x.num_experts, cfg.hidden_size),
        (*path, "gate_up"): weights.expert_gate_up(
            lambda e: (f"{name}.experts.{e}.gate_proj.weight", f"{name}.experts.{e}.up_proj.weight"),
            x.num_experts,
            cfg.hidden_size,
            x.ffn_size,
        ),
        (*path, "down"): weights.expert_down(
            lambda e: f"{name}.experts.{e}.down_proj.weight", x.num_experts, cfg.hidden_size, x.ffn_size
        ),
    }
    if x.correction_bias:
        result[*path, "correction"] = whole(f"{name}.gate.e_score_correction_bias", x.num_experts)
    return result


FAMILY = Family("qwen3_moe", config, weight_map)
