"""GGUF metadata -> the keys of a Hugging Face `config.json` and `generation_config.json`.

Metadata of the architecture that is neither translated, nor checked, nor known to change nothing is refused
by name: a model that computes something else must not load. Knows nothing of files or tensors, but for the
factors of Llama 3's rotary embedding, which GGUF stores as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf_families import Family

# Key below the architecture's prefix -> config key.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_EPSILON, _THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
_DEFAULT_THETA = 10000.0
# These must repeat what the config says.
_REPEATED = {
    "vocab_size": "vocab_size",
    "rope.dimension_count": "head_dim",
    "attention.value_length": "head_dim",
}
# These change nothing as long as they have this value.
_NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}
_SCALING_TYPE, _SCALING_FACTOR = "rope.scaling.type", "rope.scaling.factor"
_SCALING_LENGTH, _SCALING_TUNED = "rope.scaling.original_context_length", "rope.scaling.finetuned"
_READ = {
    *_SIZES,
    _EPSILON,
    _THETA,
    *_REPEATED,
    _SCALING_TYPE,
    _SCALING_FACTOR,
    _SCALING_LENGTH,
    _SCALING_TUNED,
}

_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_TURN_ENDS = ("eos", "eot", "eom")
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def hf_config(family: Family, metadata: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """The config, without the keys that only the tensors know (`tie_word_embeddings`, biases).

    Args:
        family: The entry of the file's architecture.
        metadata: The file's metadata.
        vocab_size: Rows of the embedding. The list of tokens may be shorter (padding), never longer.
    """
    prefix = metadata["general.architecture"] + "."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        **family.constants,
        **_sizes(values),
        "rms_norm_eps": _positive_float(values, _EPSILON),
        "rope_theta": _positive_float(values, _THETA, _DEFAULT_THETA),
        **_special_tokens(metadata, vocab_size),
    }
    for key, word in family.sizes.items():
        config[word] = _whole(values, key)
    if family.model_type == "gemma3_text":
        config["query_pre_attn_scalar"] = _gemma3_query_scalar(config)
    _check_rest({key: value for key, value in values.items() if key not in family.sizes}, config)
    return config | _rope_scaling(values)


def hf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults the file states, and all token ids that end a turn where there is more than one."""
    config = {
        word: _shortest(metadata[f"general.sampling.{key}"])
        for key, word in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    ends = [metadata.get(f"tokenizer.ggml.{word}_token_id") for word in _TURN_ENDS]
    ends = [end for position, end in enumerate(ends) if end is not None and end not in ends[:position]]
    return config | ({"eos_token_id": ends} if len(ends) > 1 else {})


def llama3_rope_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_scaling` of which `rope_freqs.weight` is the result.

    GGUF keeps what each rotary frequency is divided by, Hugging Face the four numbers that is computed from.
    The factor is the largest divisor; the other three are the same in every Llama 3.1, 3.2 and 3.3. The
    divisors are computed again from them and compared: a model made with other numbers is refused.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    dim = config["head_dim"]
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError("tensor 'rope_freqs.weight' is not Llama 3 rope scaling; use the safetensors files")
    return scaling


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    found = {key: values[key] for key in _SIZES if key in values}
    for key, value in found.items():
        # Some files repeat a number for every layer; different numbers are a model nobody here can run.
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            found[key] = value[0]
        if type(found[key]) is not int or found[key] < 1:
            raise CheckpointError(f"{key}={str(value)[:40]}; expected one positive whole number")
    heads = found.get("attention.head_count", 0)
    found.setdefault("attention.head_count_kv", heads)
    if "attention.key_length" not in found and heads:
        found["attention.key_length"] = found.get("embedding_length", 0) // heads
    if missing := _SIZES.keys() - found.keys():
        raise CheckpointError(f"the metadata has no {min(missing)!r}")
    return {word: found[key] for key, word in _SIZES.items()}


def _whole(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key}={str(value)[:40]}; expected one positive whole number")
    return value


def _gemma3_query_scalar(config: Mapping[str, Any]) -> int:
    """The file does not say what scores are scaled by; only the 27B (62 layers) differs from its head width."""
    if config["num_hidden_layers"] == 62:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _positive_float(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if type(value) is not float or not 0 < value < math.inf:
        raise CheckpointError(f"{key}={value!r}; expected a positive number")
    return _shortest(value)


def _shortest(value: Any) -> Any:
    """1e-05 for 9.999999747378752e-06: the number that was written before it became a float32."""
    return float(str(np.float32(value))) if isinstance(value, float | np.floating) else value


def _special_tokens(metadata: Mapping[str, Any], vocab_size: int) -> dict[str, int | None]:
    if (num_tokens := len(metadata.get("tokenizer.ggml.tokens") or ())) > vocab_size:
        raise CheckpointError(f"{num_tokens} tokens but only {vocab_size} embedding rows")
    tokens = {word: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, word in _TOKENS.items()}
    for word, token in tokens.items():
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise CheckpointError(f"{word}={token!r}; expected a token id below {vocab_size}")
    return tokens


def _check_rest(values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for key, word in _REPEATED.items():
        if key in values and values[key] != config[word]:
            raise CheckpointError(f"{key}={str(values[key])[:40]} differs from {word}={config[word]}: not supported")
    for key in values.keys() - _READ:
        if key not in _NEUTRAL or values[key] != _NEUTRAL[key]:
            raise CheckpointError(f"{key}={str(values[key])[:40]} changes the model in a way not supported here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads or config["head_dim"] % 2 or not config["head_dim"]:
        raise CheckpointError(f"{heads} heads, {kv_heads} KV heads, head_dim={config['head_dim']} do not fit together")


def _rope_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    kind, factor = values.get(_SCALING_TYPE, "none"), values.get(_SCALING_FACTOR, 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{_SCALING_TYPE}={kind!r}; expected 'none', 'linear' or 'yarn'")
    scaling = {"rope_type": kind, "factor": _positive_float(values, _SCALING_FACTOR)}
    if kind == "yarn" and _SCALING_LENGTH in values:
        scaling["original_max_position_embeddings"] = values[_SCALING_LENGTH]
    return {"rope_scaling": scaling}
