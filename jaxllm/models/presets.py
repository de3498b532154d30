"""Configurations of well-known models, without weights: for rooflines and plans.

Each entry is what the model's own `config.json` says, read by the same `ModelConfig.from_hf`. Pure data.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import ModelConfig


def _llama2(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama2(4096, 11008, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40),
}


def model_config(name: str, *, progress: bool = True) -> ModelConfig:
    """The configuration of a preset, or of whatever `--model` can name; weights are not read."""
    return ModelConfig.from_hf(hf_config(name, progress=progress))


def hf_config(name: str, *, progress: bool = True) -> dict[str, Any]:
    """As `model_config`, in the words of Hugging Face."""
    if name in PRESETS:
        return dict(PRESETS[name])
    from jaxllm.checkpoints import open_checkpoint, resolve_model

    return open_checkpoint(resolve_model(name, progress=progress)).config
