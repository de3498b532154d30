"""Granite 3 as GGUF, in Hugging Face terms: Llama with four multipliers."""

from __future__ import annotations

from typing import Any

from jaxllm.checkpoints.gguf.family import LLAMA, LLAMA_BIASES, UNROTATED, Family, Values


def _granite(values: Values, config: dict[str, Any]) -> dict[str, Any]:
    return {"attention_multiplier": config.get("attention_multiplier") or config["head_dim"] ** -0.5}


GRANITE = Family(
    rules=LLAMA | UNROTATED,
    biases=LLAMA_BIASES,
    architecture="GraniteForCausalLM",
    model_type="granite",
    keys={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    defaults={
        "attention_multiplier": None,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    more=_granite,
)
