"""Phi-3: Llama with fused projections; a window on every layer in some sizes; the long ones stretch each frequency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families import sources as weights
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.sources import Heads, WeightMap


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Phi-3 configuration; refuses by name what it would compute wrongly."""
    fields = Fields({**hf, **_renamed(hf, "rope_parameters"), **_renamed(hf, "rope_scaling")})
    sizes = fields.sizes()
    cfg = ModelConfig(
        **sizes,
        rotary_dim=fields.rotary_dim(sizes["head_dim"]),
        **fields.rope(),
        activation=fields.activation(),
        local=fields.local(sizes["num_layers"], range(sizes["num_layers"])),
    )
    fields.done()
    return cfg


def _renamed(hf: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Early files call longrope "su" or "yarn"."""
    rope = hf.get(key)
    if not isinstance(rope, Mapping) or (rope.get("rope_type") or rope.get("type")) not in ("su", "yarn"):
        return {}
    return {key: {**rope, "rope_type": "longrope"}}


def weight_map(cfg: ModelConfig, copies: int = 1) -> WeightMap:
    """As Llama's, with one tensor for queries, keys and values and one for gate and up."""
    result = llama.weight_map(cfg, copies)
    d, f = cfg.hidden_size, cfg.intermediate_size
    for i in range(cfg.num_layers):
        name, path = f"model.layers.{i}", ("layers", i)
        fused = f"{name}.self_attn.qkv_proj.weight"
        result[*path, "attention", "qkv"] = weights.qkv(("", "", ""), Heads.of(cfg, copies), fused=fused)
        result[*path, "ffn", "gate_up"] = weights.fused_gate_up(f"{name}.mlp.gate_up_proj.weight", d, f)
    return result


FAMILY = Family("phi3", config, weight_map)
