"""Granite 3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig, RoutedExperts
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.granite import multipliers
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Part, Source, WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Granite-MoE configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes, bias = fields.sizes(), fields.flag("attention_bias")
    experts = RoutedExperts(
        num_experts=fields.size("num_local_experts"),
        per_token=fields.size("num_experts_per_tok"),
        ffn_size=sizes["intermediate_size"],
        score="softmax_chosen",
    )
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        **multipliers(fields),
        activation=fields.activation(),
        qkv_bias=bias,
        out_bias=bias,
        experts=experts,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with all experts in one tensor, gate above up."""
    assert cfg.experts is not None
    e, d, f = cfg.experts.num_experts, cfg.hidden_size, cfg.experts.ffn_size
    result = llama.weight_map(cfg, copies)
    for i in range(cfg.num_layers):
        path, name = ("layers", i, "ffn"), f"model.layers.{i}.block_sparse_moe"
        both = Part(
            name=f"{name}.input_linear.weight",
            shape=(e, 2 * f, d),
            view=(e, 2, f, d),
            order=(0, 3, 1, 2),
            start=(0, 0, 0, 0),
        )
        down = Part(
            name=f"{name}.output_linear.weight", shape=(e, d, f), view=(e, d, f), order=(0, 2, 1), start=(0, 0, 0)
        )
        result |= {
            (*path, "router"): weights.transposed(f"{name}.router.layer.weight", e, d),
            (*path, "gate_up"): Source((both,)),
            (*path, "down"): Source((down,)),
        }
    return result


FAMILY = Family("granite_moe", config, weight_map)
