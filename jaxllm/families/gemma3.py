"""Gemma 3 (text): Gemma 2 with QK-norm, five windowed layers to one global, and a rotary base for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import gemma2
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family
from jaxllm.families.rope import rope_scaling


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Gemma 3 text configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = gemma2.common(fields)
    num_layers, pattern = sizes["num_layers"], fields.size("sliding_window_pattern", 6)
    local_theta, rope = ropes(fields, 1_000_000.0, float(fields.number("rope_local_base_freq", 10000.0)))
    local = fields.local(num_layers, [i for i in range(num_layers) if (i + 1) % pattern], local_theta)
    cfg = ModelConfig(**sizes, **rope, local=local, qk_norm="head")
    fields.done()
    return cfg


def ropes(fields: Fields, theta: float, local_theta: float) -> tuple[float, dict[str, Any]]:
    """The base of windowed layers, and base and scaling of the global ones (transformers 5 nests both).

    `theta` and `local_theta` are for what the configuration leaves out.
    """
    nested = fields.get("rope_parameters", {})
    if "full_attention" not in nested:
        return local_theta, fields.rope(theta)
    fields.skip("rope_theta", "rope_scaling")
    unknown = set(nested) - {"full_attention", "sliding_attention"}
    full, sliding = dict(nested["full_attention"]), dict(nested.get("sliding_attention") or {})
    theta, local_theta = full.pop("rope_theta", theta), sliding.pop("rope_theta", local_theta)
    if unknown or rope_scaling(sliding) is not None:
        raise ValueError(
            f"config.json has rope_parameters={str(nested)[:80]}; windowed layers with scaling are refused"
        )
    return float(local_theta), {"rope_theta": float(theta), "rope_scaling": fields.scaling(full)}


FAMILY = Family("gemma3", config, gemma2.weight_map)
