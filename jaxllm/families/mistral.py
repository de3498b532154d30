"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Mistral configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = fields.sizes()
    local = fields.local(sizes["num_layers"], range(sizes["num_layers"]))
    cfg = ModelConfig(**sizes, **fields.rope(), activation=fields.activation(), local=local)
    fields.done()
    return cfg


FAMILY = Family("mistral", config, llama.weight_map)
