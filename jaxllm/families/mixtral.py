"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig, RoutedExperts
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Mixtral configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    experts = RoutedExperts(
        num_experts=fields.size("num_local_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=sizes["intermediate_size"],
        score="softmax_chosen",  # the same as softmax over all, renormalised over the chosen
    )
    cfg = ModelConfig(
        **sizes,
        **fields.rope(1_000_000.0),
        activation=fields.activation(),
        local=fields.local(sizes["num_layers"], range(sizes["num_layers"])),
        experts=experts,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with a router and one FFN per expert (`w1` gates, `w3` widens, `w2` narrows)."""
    assert cfg.experts is not None
    e, d, f = cfg.experts.num_experts, cfg.hidden_size, cfg.experts.ffn_size
    result = llama.tables(cfg)
    for i in range(cfg.num_layers):
        prefix, path = f"model.layers.{i}", ("layers", i)
        moe = f"{prefix}.block_sparse_moe"
        result |= {
            (*path, "attention_norm", "scale"): whole(f"{prefix}.input_layernorm.weight", d),
            (*path, "ffn_norm", "scale"): whole(f"{prefix}.post_attention_layernorm.weight", d),
            **llama.attention(cfg, i, copies),
            (*path, "ffn", "router"): weights.transposed(f"{moe}.gate.weight", e, d),
            (*path, "ffn", "gate_up"): weights.expert_gate_up(
                lambda x, moe=moe: (f"{moe}.experts.{x}.w1.weight", f"{moe}.experts.{x}.w3.weight"), e, d, f
            ),
            (*path, "ffn", "down"): weights.expert_down(lambda x, moe=moe: f"{moe}.experts.{x}.w2.weight", e, d, f),
        }
    return result


FAMILY = Family("mixtral", config, weight_map)
