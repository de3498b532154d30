"""GGUF metadata -> the keys of a Hugging Face `config.json` and `generation_config.json`.

Every key of the architecture is either translated, or known to change nothing while it has a neutral value (refused
by name otherwise), or unknown to llama.cpp's loader and so without effect on what such files mean: those are named in
one log line. Knows nothing of files or tensors; what only the tensors know is added by gguf_checkpoint.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.family import Family
from jaxllm.checkpoints.gguf.rope import ROPE_KEYS, rope_config

_log = logging.getLogger(__name__)

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
_NEXTN = "nextn_predict_layers"
_MAX_BLOCKS = 100_000  # keeps a damaged number from becoming a list of that length
# These say what is computed anyway, or speak of other uses of the model.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "pooling_type", "classifier.output_labels", _NEXTN})
# These change the mathematics of families that do not read them, unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_length_per_layer_input": (0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_gating_func": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "full_attention_interval": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "router_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}
# These must repeat what another key says.
_REPEATED = {
    "attention.value_length": "head_dim",
    "attention.key_length_swa": "head_dim",
    "attention.value_length_swa": "head_dim",
    "embedding_length_out": "hidden_size",
}
# Of what some families have besides, these count something that must be there.
_WHOLE = frozenset(
    {
        "attention.kv_lora_rank",
        "attention.q_lora_rank",
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
    }
)
_SOFTMAX, _SOFTMAX_CHOSEN = 1, 3  # expert_gating_func

_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_TURN_ENDS = ("eos", "eot", "eom")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


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
        "rms_norm_eps": _positive_float(values, family.epsilon),
        **_special_tokens(metadata, vocab_size),
    }
    config |= _own_keys(family, values)
    if family.more is not None:
        config |= family.more(values, config)
    _check(family, values, config)
    config |= rope_config(family, values, config)
    _name_ignored(family, values)
    return config


def renamed(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the keys that this architecture calls otherwise."""
    names = ((family.rename.get(key, key), value) for key, value in config.items())
    return {name: value for name, value in names if name is not None}


def hf_generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults the file states, and all token ids that end a turn where there is more than one."""
    found = {word: metadata.get(f"general.sampling.{key}") for key, word in _SAMPLING.items()}
    config = {word: _shortest(value) for word, value in found.items() if _is_number(value)}
    ends = [metadata.get(f"tokenizer.ggml.{word}_token_id") for word in _TURN_ENDS]
    ends = list(dict.fromkeys(end for end in ends if type(end) is int))
    return config | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sizes(values: Mapping[str, Any]) -> dict[str, int]:
    found = {key: _uniform(key, values[key]) for key in _SIZES if key in values}
    for key, value in found.items():
        _require_whole(key, value)
    heads = found.get("attention.head_count", 0)
    found.setdefault("attention.head_count_kv", heads)
    if "attention.key_length" not in found and heads:
        found["attention.key_length"] = found.get("embedding_length", 0) // heads
    if missing := _SIZES.keys() - found.keys():
        raise CheckpointError(f"the metadata has no {min(missing)!r}")
    if found["block_count"] > _MAX_BLOCKS:
        raise CheckpointError(f"block_count={found['block_count']}; expected at most {_MAX_BLOCKS}")
    extra = values.get(_NEXTN, 0)
    if type(extra) is not int or not 0 <= extra < found["block_count"]:
        raise CheckpointError(f"{_NEXTN}={str(extra)[:40]}; expected fewer than the {found['block_count']} blocks")
    found["block_count"] -= extra  # the last blocks predict further tokens; generation does not use them
    return {word: found[key] for key, word in _SIZES.items()}


def _own_keys(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """What only this architecture has, under its config keys."""
    config = dict(family.defaults)
    for key, word in family.keys.items():
        if key in values:
            config[word] = _own_value(key, _uniform(key, values[key]))
        elif word not in family.defaults:
            given = next((f", but {name}={str(values[name])[:40]}" for name in family.keys if name in values), "")
            raise CheckpointError(f"the metadata has no {key!r}{given}")
    return config


def _own_value(key: str, value: Any) -> Any:
    if key in _WHOLE:
        _require_whole(key, value)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        raise CheckpointError(f"{key}={str(value)[:40]}; expected a finite number")
    return _shortest(value)


def _uniform(key: str, value: Any) -> Any:
    """Some files repeat a number for every layer; different numbers are a model nobody here can run."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def _require_whole(key: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{key}={str(value)[:40]}; expected one positive whole number")


def _positive_float(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
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
            if word == "pad_token_id":  # nothing is padded with it
                tokens[word] = None
                continue
            raise CheckpointError(f"{word}={token!r}; expected a token id below {vocab_size}")
    return tokens


def _check(family: Family, values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    own = family.keys.keys() | family.reads
    for key, word in _REPEATED.items():
        if key in values and key not in own and _uniform(key, values[key]) != config[word]:
            raise CheckpointError(f"{key}={str(values[key])[:40]} differs from {word}={config[word]}: not supported")
    for key in values.keys() & _NEUTRAL.keys() - own:
        if not _is_neutral(key, _uniform(key, values[key]), config):
            raise CheckpointError(f"{key}={str(values[key])[:40]} changes the model in a way not supported here")
    if "attention.scale" in values and "attention.scale" not in own:
        scale, usual = values["attention.scale"], config["head_dim"] ** -0.5
        if scale and not math.isclose(scale, usual, rel_tol=1e-5):
            raise CheckpointError(f"attention.scale={scale} is not {usual:.6g}: not supported in this architecture")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % kv_heads or config["head_dim"] % 2 or not config["head_dim"]:
        raise CheckpointError(f"{heads} heads, {kv_heads} KV heads, head_dim={config['head_dim']} do not fit together")


def _is_neutral(key: str, value: Any, config: Mapping[str, Any]) -> bool:
    if key == "attention.sliding_window" and type(value) is int:
        return value == 0 or value >= config["max_position_embeddings"]
    if key == "expert_gating_func" and "num_experts_per_tok" in config:
        return value in (0, _SOFTMAX, _SOFTMAX_CHOSEN if config["model_type"] == "gpt_oss" else _SOFTMAX)
    if key == "expert_weights_norm" and "num_experts_per_tok" in config:
        return value is True  # Mixtral, gpt-oss and Granite know no other way
    return value in _NEUTRAL[key]


def _name_ignored(family: Family, values: Mapping[str, Any]) -> None:
    known = {
        *_SIZES,
        *_REPEATED,
        *_NEUTRAL,
        *_HARMLESS,
        *ROPE_KEYS,
        *family.keys,
        *family.reads,
        family.epsilon,
        "attention.scale",
    }
    if ignored := sorted(values.keys() - known):
        _log.info("GGUF metadata without effect on a %s model: %s", family.model_type, ", ".join(ignored)[:500])
