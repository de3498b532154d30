"""Phi-3: Llama with fused projections; a window on every layer in some sizes. Its "longrope" is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Heads, Part, Source, WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Phi-3 configuration; refuses by name what it would compute wrongly."""
    nested = dict(hf.get("rope_parameters") or {})
    partial = nested.pop("partial_rotary_factor", hf.get("partial_rotary_factor") or 1.0)
    fields = Fields({**hf, "rope_parameters": nested} if nested else hf)
    sizes = fields.sizes()
    fields.skip("original_max_position_embeddings", "partial_rotary_factor")  # the first is of longrope
    cfg = ModelConfig(
        **sizes,
        **fields.rope(),
        rotary_dim=int(sizes["head_dim"] * partial),
        activation=fields.activation(),
        local=fields.local(sizes["num_layers"], range(sizes["num_layers"])),
    )
    fields.done()
    return cfg


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with one tensor for queries, keys and values and one for gate and up."""
    result = llama.weight_map(cfg, copies)
    d, f = cfg.hidden_size, cfg.intermediate_size
    for i in range(cfg.num_layers):
        name, path = f"model.layers.{i}", ("layers", i)
        fused = f"{name}.self_attn.qkv_proj.weight"
        result[*path, "attention", "qkv"] = weights.qkv(("", "", ""), Heads.of(cfg, copies), fused=fused)
        part = Part(
            name=f"{name}.mlp.gate_up_proj.weight", shape=(2 * f, d), view=(2, f, d), order=(2, 0, 1), start=(0, 0, 0)
        )
        result[*path, "ffn", "gate_up"] = Source((part,))
    return result


FAMILY = Family("phi3", config, weight_map)
