"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values; windows on the upper layers if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import LocalAttention, ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Qwen2 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    local = local_layers(fields, sizes["num_layers"])
    cfg = ModelConfig(**sizes, **fields.rope(), activation=fields.activation(), local=local, qkv_bias=True)
    fields.done()
    return cfg


def local_layers(fields: Fields, num_layers: int) -> LocalAttention | None:
    """`use_sliding_window` switches the windows of the layers from `max_window_layers` on."""
    first = fields.count("max_window_layers", 28)
    if fields.flag("use_sliding_window"):
        return fields.local(num_layers, range(min(first, num_layers), num_layers))
    fields.skip("sliding_window")
    if "sliding_attention" in fields.layer_types(num_layers):
        raise ValueError("config.json has sliding layers in layer_types but use_sliding_window is false")
    return None


FAMILY = Family("qwen2", config, llama.weight_map)
