"""OLMo 3: OLMo 2 with a window on three of four layers, where the rotary scaling of the others does not apply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import olmo2
from jaxllm.families.gemma3 import ropes
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face OLMo 3 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes, bias = fields.sizes(), fields.flag("attention_bias")
    local_theta, rope = ropes(fields, 500_000.0, 500_000.0)
    cfg = ModelConfig(
        **sizes,
        **rope,
        activation=fields.activation(),
        local=fields.local(sizes["num_layers"], [i for i in range(sizes["num_layers"]) if (i + 1) % 4], local_theta),
        pre_norm=False,
        post_norm=True,
        qk_norm="full",
        qkv_bias=bias,
        out_bias=bias,
    )
    fields.done()
    return cfg


FAMILY = Family("olmo3", config, olmo2.weight_map)
