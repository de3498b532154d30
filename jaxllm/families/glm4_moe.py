"""GLM-4.5 and 4.6: Llama's attention of which half of a head turns, and DeepSeek-V3's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import deepseek, llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face GLM-4-MoE configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    cfg = ModelConfig(
        **sizes,
        rotary_dim=fields.rotary_dim(sizes["head_dim"], 0.5),
        **fields.rope(),
        activation=fields.activation(),
        qk_norm="head" if fields.flag("use_qk_norm") else None,
        qkv_bias=fields.flag("attention_bias"),
        experts=deepseek.routed_experts(fields, sizes, is_v3=True),
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with DeepSeek's experts in the routed layers."""
    result = llama.weight_map(cfg, copies)
    for i in filter(cfg.is_routed, range(cfg.num_layers)):
        for name in ("gate_up", "down"):
            del result["layers", i, "ffn", name]
        result |= deepseek.routed(cfg, i)
    return result


FAMILY = Family("glm4_moe", config, weight_map)
