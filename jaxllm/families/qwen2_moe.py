"""Qwen2-MoE: Qwen2 with a mixture of experts in most layers, and an expert for every token behind a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import LocalAttention, ModelConfig, RoutedExperts
from jaxllm.families import llama, qwen3_moe
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Qwen2-MoE configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    experts = RoutedExperts(
        num_experts=fields.size("num_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=fields.size("moe_intermediate_size"),
        renormalize=fields.flag("norm_topk_prob"),
        shared_size=fields.size("shared_expert_intermediate_size", 5632),
        shared_gate=True,
        dense_layers=qwen3_moe.dense_layers(fields, sizes["num_layers"]),
    )
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        activation=fields.activation(),
        local=_local(fields, sizes["num_layers"]),
        qkv_bias=fields.flag("qkv_bias", True),
        experts=experts,
    )
    fields.done()
    return cfg


def _local(fields: Fields, num_layers: int) -> LocalAttention | None:
    """With `use_sliding_window` every other layer below `max_window_layers` has the window."""
    first_full = fields.count("max_window_layers", 28)
    if fields.flag("use_sliding_window"):
        return fields.local(num_layers, range(0, min(first_full, num_layers), 2))
    fields.skip("sliding_window")
    if "sliding_attention" in fields.layer_types(num_layers):
        raise ValueError("config.json has sliding layers in layer_types but use_sliding_window is false")
    return None


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Qwen3-MoE's, with the shared expert and its gate."""
    assert cfg.experts is not None
    result, d = qwen3_moe.weight_map(cfg, copies), cfg.hidden_size
    for i in filter(cfg.is_routed, range(cfg.num_layers)):
        result |= llama.ffn(cfg, i, "mlp.shared_expert", ("ffn", "shared"), cfg.experts.shared_size)
        gate = f"model.layers.{i}.mlp.shared_expert_gate.weight"
        result["layers", i, "ffn", "shared_gate"] = weights.transposed(gate, 1, d)
    return result


FAMILY = Family("qwen2_moe", config, weight_map)
