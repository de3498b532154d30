"""GLM-4 (dense): half of each head turns, in neighbouring pairs; biases on queries, keys and values; gate and up fused.

The first release (`GlmForCausalLM`) has Llama's two norms, the one of 0414 (`Glm4ForCausalLM`) two more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face GLM configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    head_dim = sizes["head_dim"]
    cfg = ModelConfig(
        **sizes | {"head_dim": head_dim},
        rotary_dim=fields.rotary_dim(head_dim, 0.5),
        **fields.rope(),
        rope_interleaved=True,
        activation=fields.activation(),
        post_norm=fields.architecture == "Glm4ForCausalLM",
        qkv_bias=fields.flag("attention_bias", True),
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with gate and up in one tensor, and the norms after each half where there are any."""
    result, d = llama.weight_map(cfg, copies), cfg.hidden_size
    for i in range(cfg.num_layers):
        name, path = f"model.layers.{i}", ("layers", i)
        result[*path, "ffn", "gate_up"] = weights.fused_gate_up(
            f"{name}.mlp.gate_up_proj.weight", d, cfg.intermediate_size
        )
        if cfg.post_norm:
            result[*path, "attention_post_norm", "scale"] = whole(f"{name}.post_self_attn_layernorm.weight", d)
            result[*path, "ffn_post_norm", "scale"] = whole(f"{name}.post_mlp_layernorm.weight", d)
    return result


FAMILY = Family("glm", config, weight_map)
