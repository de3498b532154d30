"""Configurations of well-known models, without weights: for `--load-format dummy`, plans and rooflines.

Each entry is what the model's own `config.json` says, read by the same `read_config`. Pure data.
"""

from __future__ import annotations

import difflib
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.families.registry import read_config

_LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama31(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA31_ROPE,
        "max_position_embeddings": 131072,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


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


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int = 8) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


def _dense(
    architecture: str,
    vocab: int,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    positions: int,
    **rest: Any,
) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        **rest,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama31(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama31(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama31(16384, 53248, 126, 128),
    "llama-2-7b": _llama2(4096, 11008, 32, 32),
    "llama-2-13b": _llama2(5120, 13824, 40, 40),
    "mistral-7b": {
        **_llama2(4096, 14336, 32, 32),
        "architectures": ["MistralForCausalLM"],
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
    },
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": {
        **_qwen3(2048, 6144, 48, 32, kv_heads=4),
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "gemma-3-27b": {
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262208,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "gemma-7b": _dense(
        "Gemma",
        256000,
        3072,
        24576,
        28,
        16,
        16,
        8192,
        head_dim=256,
        rms_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
        bos_token_id=2,
        eos_token_id=1,
    ),
    "smollm3-3b": _dense(
        "SmolLM3",
        128256,
        2048,
        11008,
        36,
        16,
        4,
        65536,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        no_rope_layer_interval=4,
        bos_token_id=128000,
        eos_token_id=128012,
    ),
    "granite-3.3-8b": _dense(
        "Granite",
        49159,
        4096,
        12800,
        40,
        32,
        8,
        131072,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        tie_word_embeddings=True,
        attention_multiplier=0.0078125,
        embedding_multiplier=12.0,
        logits_scaling=16.0,
        residual_multiplier=0.22,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "glm-4-9b-0414": _dense(
        "Glm4",
        151552,
        4096,
        13696,
        40,
        32,
        2,
        32768,
        head_dim=128,
        rms_norm_eps=1e-5,
        partial_rotary_factor=0.5,
        attention_bias=True,
        eos_token_id=[151329, 151336, 151338],
    ),
    "olmo-3-7b": _dense(
        "Olmo3",
        100278,
        4096,
        11008,
        32,
        32,
        32,
        65536,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
        sliding_window=4096,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        eos_token_id=100257,
    ),
    "command-r7b": _dense(
        "Cohere2",
        256000,
        4096,
        14336,
        32,
        32,
        8,
        132096,
        layer_norm_eps=1e-5,
        rope_theta=50000.0,
        sliding_window=4096,
        sliding_window_pattern=4,
        logit_scale=0.25,
        bos_token_id=5,
        eos_token_id=255001,
    ),
    "qwen1.5-moe-a2.7b": _dense(
        "Qwen2Moe",
        151936,
        2048,
        5632,
        24,
        16,
        16,
        8192,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        norm_topk_prob=False,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
    "mixtral-8x7b": {
        **_llama2(4096, 14336, 32, 32),
        "architectures": ["MixtralForCausalLM"],
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "gpt-oss-120b": {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "max_position_embeddings": 131072,
        "eos_token_id": 200002,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
}


def preset(name: str) -> ModelConfig:
    """The configuration of a well-known model. Raises ValueError with the nearest name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no preset {name!r}{hint}; there are {', '.join(PRESETS)}")
    return read_config(PRESETS[name])


def model_config(name: str, *, progress: bool = True) -> ModelConfig:
    """The configuration of a preset, or of whatever `--model` can name; weights are not read."""
    return read_config(hf_config(name, progress=progress))


def hf_config(name: str, *, progress: bool = True) -> dict[str, Any]:
    """As `model_config`, in the words of Hugging Face."""
    if name in PRESETS:
        return dict(PRESETS[name])
    from jaxllm.checkpoints import open_checkpoint, resolve_model
    from jaxllm.checkpoints.safetensors_folder import folder_config

    path = resolve_model(name, progress=progress)
    return folder_config(path) if path.is_dir() else open_checkpoint(path).config  # a folder needs no weights for this
