"""Gemma 2: norms before and after, weights stored as `w` of `1 + w`, soft-caps, every other layer windowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Gemma 2 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = common(fields)
    local = fields.local(sizes["num_layers"], range(0, sizes["num_layers"], 2))
    cfg = ModelConfig(**sizes, **fields.rope(), local=local)
    fields.done()
    return cfg


def common(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    sizes, bias = fields.sizes(), fields.flag("attention_bias")
    return {
        **sizes,
        "activation": fields.activation("hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        "attention_scale": fields.positive("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": _cap(fields, "attn_logit_softcapping"),
        "final_softcap": _cap(fields, "final_logit_softcapping"),
        "post_norm": True,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _cap(fields: Fields, key: str) -> float | None:
    return None if fields.get(key) is None else fields.positive(key)


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with four norms per block, all of them `1 + w`."""
    result = llama.tables(cfg, norm_offset=1.0)
    names = {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }
    for i in range(cfg.num_layers):
        for ours, theirs in names.items():
            name = f"model.layers.{i}.{theirs}.weight"
            result["layers", i, ours, "scale"] = whole(name, cfg.hidden_size, offset=1.0)
        result |= llama.attention(cfg, i, copies, norm_offset=1.0) | llama.ffn(cfg, i)
    return result


FAMILY = Family("gemma2", config, weight_map)
