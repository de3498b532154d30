"""OLMo 2: norms after each half of a block instead of before, and QK-norm over all heads of a token together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face OLMo 2 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    bias = fields.flag("attention_bias")
    cfg = ModelConfig(
        **fields.sizes(),
        **fields.rope(),
        activation=fields.activation(),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        qkv_bias=bias,
        out_bias=bias,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with the two norms of a block after its halves."""
    result = llama.tables(cfg)
    for i in range(cfg.num_layers):
        prefix, path = f"model.layers.{i}", ("layers", i)
        result |= {
            (*path, "attention_post_norm", "scale"): whole(
                f"{prefix}.post_attention_layernorm.weight", cfg.hidden_size
            ),
            (*path, "ffn_post_norm", "scale"): whole(f"{prefix}.post_feedforward_layernorm.weight", cfg.hidden_size),
            **llama.attention(cfg, i, copies),
            **llama.ffn(cfg, i),
        }
    return result


FAMILY = Family("olmo2", config, weight_map)
