"""Gemma 1: Llama with norms of `1 + w`, a tanh-approximated GELU, and embeddings scaled by the root of their width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import WeightMap, whole


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Gemma configuration; refuses by name what it would compute wrongly.

    The first release said `hidden_act: gelu` and meant its approximation; `hidden_activation` came later.
    """
    fields = Fields(hf)
    fields.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    sizes, bias = fields.sizes(), fields.flag("attention_bias")
    cfg = ModelConfig(
        **sizes
        | {"head_dim": fields.size("head_dim", 256), "tie_word_embeddings": fields.flag("tie_word_embeddings", True)},
        **fields.rope(),
        activation="gelu_tanh",
        embedding_scale=sizes["hidden_size"] ** 0.5,
        qkv_bias=bias,
        out_bias=bias,
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with all norms `1 + w`."""
    result = llama.weight_map(cfg, copies) | llama.tables(cfg, norm_offset=1.0)
    for i in range(cfg.num_layers):
        for ours, theirs in (("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            name = f"model.layers.{i}.{theirs}.weight"
            result["layers", i, ours, "scale"] = whole(name, cfg.hidden_size, offset=1.0)
    return result


FAMILY = Family("gemma", config, weight_map)
