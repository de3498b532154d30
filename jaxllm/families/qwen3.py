"""Qwen3: Llama with a norm on every query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.qwen2 import local_layers
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Qwen3 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    local = local_layers(fields, sizes["num_layers"])
    bias = fields.flag("attention_bias")
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        activation=fields.activation(),
        local=local,
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
    )
    fields.done()
    return cfg


FAMILY = Family("qwen3", config, llama.weight_map)
