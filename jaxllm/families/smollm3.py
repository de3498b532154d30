"""SmolLM3: Llama whose every fourth layer has no positions; those layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families import llama
from jaxllm.families.hf_config import Fields
from jaxllm.families.registry import Family


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face SmolLM3 configuration; refuses by name what it would compute wrongly."""
    fields = Fields(hf)
    sizes, bias = fields.sizes(), fields.flag("attention_bias")
    unrotated = _unrotated(fields, sizes["num_layers"])
    if fields.flag("use_sliding_window"):
        local = fields.local(sizes["num_layers"], unrotated)
    else:
        fields.skip("sliding_window", "layer_types")  # transformers reads them only with use_sliding_window
        local = None
    cfg = ModelConfig(
        **sizes | {"tie_word_embeddings": fields.flag("tie_word_embeddings", True)},
        **fields.rope(2_000_000.0),
        activation=fields.activation(),
        unrotated_layers=unrotated,
        local=local,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
    )
    fields.done()
    return cfg


def _unrotated(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """`no_rope_layers` has a 1 for each layer that rotates; without it every n-th layer does not."""
    rotates, interval = fields.get("no_rope_layers"), fields.size("no_rope_layer_interval", 4)
    if rotates is None:
        rotates = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(rotates, list) or len(rotates) < num_layers:
        raise ValueError(f"config.json has no_rope_layers={str(rotates)[:60]}; expected a list of {num_layers}")
    return tuple(i for i in range(num_layers) if not rotates[i])


FAMILY = Family("smollm3", config, llama.weight_map)
