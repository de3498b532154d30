"""Gemma 3 (text): Gemma 2 with QK-norm, five windowed layers to one global, and a rotary base for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import gemma2
from jaxllm.families.hf_config import Fields, positive
from jaxllm.families.notices import say_once
from jaxllm.families.registry import Family
from jaxllm.families.rope import rope_scaling


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Gemma 3 text configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes = gemma2.common(fields)
    num_layers, pattern = sizes["num_layers"], fields.size("sliding_window_pattern", 6)
    local_theta, rope = ropes(fields, 1_000_000.0, fields.positive("rope_local_base_freq", 10_000.0))
    local = fields.local(num_layers, [i for i in range(num_layers) if (i + 1) % pattern], local_theta)
    cfg = ModelConfig(**sizes, **rope, local=local, qk_norm="head")
    fields.done()
    return cfg


def ropes(fields: Fields, theta: float, local_theta: float) -> tuple[float, dict[str, Any]]:
    """The base of windowed layers, and base and scaling of the global ones.

    transformers 5 nests both in `rope_parameters`; `rope_scaling`, which is older, adds to the global one. `theta` and
    `local_theta` are for what the configuration leaves out.
    """
    nested, older = fields.object("rope_parameters"), fields.object("rope_scaling")
    plain = {"rope_type": "default"}
    full = {"rope_theta": fields.positive("rope_theta", theta), **(_kind(nested, "full_attention") or plain), **older}
    local = {"rope_theta": local_theta, **_kind(nested, "sliding_attention")}
    base, local_base = (positive("rope_theta", parameters.pop("rope_theta")) for parameters in (full, local))
    if full.pop("truncate", True) is not True:
        say_once("truncate=false in the rope parameters of one kind of layers is ignored, as transformers does")
    if rope_scaling(local) is not None:
        raise ValueError(
            f"config.json has rope_parameters={str(nested)[:80]}; windowed layers with scaling are refused"
        )
    return local_base, {"rope_theta": base, "rope_scaling": fields.scaling(full)}


def _kind(nested: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    parameters = nested.get(name) or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json has {name}={parameters!r} in rope_parameters; an object is required")
    return {key: value for key, value in parameters.items() if value is not None}


FAMILY = Family("gemma3", config, gemma2.weight_map)
