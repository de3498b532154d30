"""Granite 3: Llama with four multipliers, of embeddings, scores, what each half block adds, and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Granite configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    bias = fields.flag("attention_bias")
    cfg = ModelConfig(
        **fields.sizes(),
        **fields.rope(),
        **multipliers(fields),
        activation=fields.activation(),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
    fields.done()
    return cfg


def multipliers(fields: Fields) -> dict[str, Any]:
    """The four; logits are divided by theirs."""
    scaling = float(fields.number("logits_scaling", 1.0))
    if scaling == 0:
        raise ValueError("config.json has logits_scaling=0; logits are divided by it")
    return {
        "embedding_scale": float(fields.number("embedding_multiplier", 1.0)),
        "attention_scale": float(fields.number("attention_multiplier", 1.0)),
        "residual_scale": float(fields.number("residual_multiplier", 1.0)),
        "logit_scale": 1.0 / scaling,
    }


FAMILY = Family("granite", config, llama.weight_map)
