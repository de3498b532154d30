"""Llama family: Hugging Face configuration and weight names -> `ModelConfig` and decoder parameters.

Data only: the mathematics is `decoder.py`. Covers every folder whose architecture is `LlamaForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig, RopeScaling
from jaxllm.models.families import Family, Path, Source

# Keys that do not change what one forward pass computes.
_IGNORED = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id unk_token_id attention_dropout hidden_dropout _name_or_path is_llama_config "
    "transformers.js_config task_specific_params id2label label2id problem_type return_dict output_attentions "
    "output_hidden_states chunk_size_feed_forward _attn_implementation _attn_implementation_autoset "
    "is_encoder_decoder".split()
)
_REQUIRED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps "
    "max_position_embeddings".split()
)
# Keys that would change the mathematics, with the only value this family computes.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "pretraining_tp": 1,
    "sliding_window": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_OPTIONAL = frozenset(
    ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings")
)


def config(hf: Mapping[str, Any]) -> ModelConfig:
    """Map a Hugging Face Llama configuration; refuses by name what it would compute wrongly."""
    for key in _REQUIRED:
        if not isinstance(hf.get(key), int | float):
            raise ValueError(f"config.json has {key}={hf.get(key)!r}; a number is required")
    for key, value in hf.items():
        if key in _FIXED and value not in (_FIXED[key], None):
            raise ValueError(f"config.json has {key}={value!r}; this family supports only {_FIXED[key]!r}")
        if key not in _FIXED and key not in _IGNORED and key not in _OPTIONAL and key not in _REQUIRED:
            raise ValueError(
                f"config.json has an unknown field {key}={value!r} that may change the mathematics; refused"
            )
    rope = _rope_parameters(hf)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        rms_norm_eps=float(hf["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        max_position_embeddings=hf["max_position_embeddings"],
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
    )


def _rope_parameters(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`, earlier versions `rope_scaling`; both hold the same keys."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; supported are 'default' and 'llama3'")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def weight_map(cfg: ModelConfig) -> dict[Path, Source]:
    """Parameter path in the decoder -> the checkpoint tensors it is made of. PyTorch linears are [out, in]."""
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    n, k = cfg.num_heads, cfg.num_kv_heads

    def qkv(q: np.ndarray, key: np.ndarray, v: np.ndarray) -> np.ndarray:
        parts = (q.reshape(k, n // k, h, d), key.reshape(k, 1, h, d), v.reshape(k, 1, h, d))
        return np.concatenate(parts, axis=1).transpose(3, 0, 1, 2)

    def same(x: np.ndarray) -> np.ndarray:
        return x

    sources: dict[Path, Source] = {
        ("embedding",): Source(("model.embed_tokens.weight",), ((cfg.vocab_size, d),), same),
        ("final_norm",): Source(("model.norm.weight",), ((d,),), same),
    }
    if not cfg.tie_word_embeddings:
        sources["lm_head",] = Source(("lm_head.weight",), ((cfg.vocab_size, d),), same)
    for i in range(cfg.num_layers):
        prefix = f"model.layers.{i}"
        attn, mlp, path = f"{prefix}.self_attn", f"{prefix}.mlp", ("layers", i)
        sources |= {
            (*path, "attention_norm"): Source((f"{prefix}.input_layernorm.weight",), ((d,),), same),
            (*path, "qkv"): Source(
                (f"{attn}.q_proj.weight", f"{attn}.k_proj.weight", f"{attn}.v_proj.weight"),
                ((n * h, d), (k * h, d), (k * h, d)),
                qkv,
            ),
            (*path, "out"): Source(
                (f"{attn}.o_proj.weight",), ((d, n * h),), lambda o: o.reshape(d, k, n // k, h).transpose(1, 2, 3, 0)
            ),
            (*path, "ffn_norm"): Source((f"{prefix}.post_attention_layernorm.weight",), ((d,),), same),
            (*path, "gate_up"): Source(
                (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
                ((f, d), (f, d)),
                lambda gate, up: np.stack([gate.T, up.T], axis=1),
            ),
            (*path, "down"): Source((f"{mlp}.down_proj.weight",), ((d, f),), lambda w: w.T),
        }
    return sources


FAMILY = Family("llama", config, weight_map, ignored_tensors=("rotary_emb.inv_freq", "lm_head.weight"))
