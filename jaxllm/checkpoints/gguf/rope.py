"""The rotary embedding that a GGUF file describes, in the keys of a Hugging Face `config.json`.

Metadata (and, for stretched frequencies, the factors that GGUF stores as tensors) -> `rope_theta`, `rope_scaling` and
what stands beside them. Knows nothing of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.family import Family

_DEFAULT_THETA = 10000.0
_TYPE, _FACTOR, _LENGTH = "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"
_OLD_FACTOR = "rope.scale_linear"  # of 2023
_ATTENTION, _YARN_ATTENTION = "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"
_LOG = "rope.scaling.yarn_log_multiplier"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.alpha": (0.0, 1.0),
}
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
ROPE_KEYS = frozenset(
    {
        _TYPE,
        _FACTOR,
        _LENGTH,
        _OLD_FACTOR,
        _ATTENTION,
        _YARN_ATTENTION,
        _LOG,
        *_NEUTRAL,
        *_BETAS,
        "rope.scaling.finetuned",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "rope.dimension_sections",
    }
)


def rope_config(family: Family, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`, as far as the metadata says."""
    theta = _positive(values, "rope.freq_base", _DEFAULT_THETA)
    for key, neutral in _NEUTRAL.items():
        if values.get(key, neutral[0]) not in neutral:
            raise CheckpointError(f"{key}={values[key]!r} is not supported; expected {neutral[0]}")
    own = family.keys.keys() | family.reads
    local = values.get("rope.freq_base_swa")
    if local is not None and "rope.freq_base_swa" not in own and "sliding_window" in config and local != theta:
        raise CheckpointError(f"rope.freq_base_swa={local} differs from rope.freq_base={theta}: not supported here")
    if family.nests_rope:
        return {"rope_parameters": _nested(theta, local, _scaling(family, values))}
    if "rope.dimension_count" in own:
        return {"rope_theta": theta, **_scaling(family, values)}
    return {"rope_theta": theta, **_scaling(family, values), **_partial(family, values, config)}


def _nested(theta: float, local: float | None, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A rotation of their own for windowed layers, whose frequencies are not stretched."""
    full = scaling.get("rope_scaling", {"rope_type": "default"})
    return {
        "full_attention": {"rope_theta": theta, **full},
        "sliding_attention": {"rope_theta": theta if local is None else _shortest(local), "rope_type": "default"},
    }


def llama3_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_scaling` of which the tensor `rope_freqs.weight` is the result.

    GGUF keeps what each rotary frequency is divided by, Hugging Face the four numbers that is computed from. The
    factor is the largest divisor; the other three are the same in every Llama 3.1, 3.2 and 3.3. The divisors are
    computed again from them and compared; where they differ they are kept as they are, as one "longrope".
    """
    size = int(config["head_dim"] * config.get("partial_rotary_factor", 1.0)) // 2
    if factors.shape != (size,) or not np.all(np.isfinite(factors)) or factors.min() <= 0:
        raise CheckpointError(f"tensor 'rope_freqs.weight' does not hold {size} positive numbers, one per frequency")
    scaling = {
        "rope_type": "llama3",
        "factor": _shortest(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(size) / size)
    smooth = np.clip((8192 / wavelengths - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if np.allclose(factors, expected, rtol=1e-3):
        return scaling
    listed = [_shortest(value) for value in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def longrope_scaling(short: np.ndarray, long: np.ndarray, values: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_scaling` of Phi-3's two tensors of factors; the lengths stand beside it."""
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [_shortest(value) for value in short],
        "long_factor": [_shortest(value) for value in long],
    }
    if _ATTENTION in values:
        scaling["attention_factor"] = _positive(values, _ATTENTION)
    return scaling


def _scaling(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling`, unless its factors are tensors."""
    factor_key = _OLD_FACTOR if _OLD_FACTOR in values and _FACTOR not in values else _FACTOR
    kind, factor = values.get(_TYPE, "linear"), values.get(factor_key, 0.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {}
    if kind == "longrope":
        if family.model_type != "phi3":
            raise CheckpointError(f"{_TYPE}='longrope' is supported in phi3 files only")
        return {}
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{_TYPE}={kind!r}; expected 'none', 'linear', 'yarn' or 'longrope'")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _positive(values, factor_key)}
    if kind == "yarn":
        scaling |= _yarn(family, values)
    if values.get(_ATTENTION, 1.0) != 1.0:
        raise CheckpointError(f"{_ATTENTION}={values[_ATTENTION]} is not supported with {_TYPE}={kind!r}")
    return {"rope_scaling": scaling}


def _yarn(family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    scaling: dict[str, Any] = {word: _positive(values, key) for key, word in _BETAS.items() if key in values}
    if _LENGTH in values:
        scaling["original_max_position_embeddings"] = values[_LENGTH]
    if values.get(_YARN_ATTENTION, 1.0) != 1.0:
        scaling["attention_factor"] = _positive(values, _YARN_ATTENTION)
    if family.model_type == "gpt_oss":  # its files cannot say so: the borders are not rounded
        scaling["truncate"] = False
    if log := values.get(_LOG):
        # DeepSeek-V2's converter writes a tenth of `mscale_all_dim`, and both magnitudes are the same there.
        is_deepseek = family.model_type.startswith("deepseek")
        weight = _shortest(_shortest(log) * 10 if is_deepseek else log)
        scaling |= {"mscale": weight if is_deepseek else 1.0, "mscale_all_dim": weight}
    return scaling


def _partial(family: Family, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """How many dims of a head turn."""
    head_dim = config["head_dim"]
    count = values.get("rope.dimension_count", head_dim)
    if not family.has_partial_rotary:
        if count != head_dim:
            raise CheckpointError(f"rope.dimension_count={count} differs from head_dim={head_dim}: not supported")
        return {}
    if type(count) is not int or not 0 < count <= head_dim or count % 2:
        raise CheckpointError(f"rope.dimension_count={count!r}; expected an even number up to {head_dim}")
    if family.model_type == "glm4" and any(values.get("rope.dimension_sections", ())):
        raise CheckpointError("rope.dimension_sections: this file's rows are ordered for a vision model; not supported")
    return {"partial_rotary_factor": count / head_dim}


def _positive(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if type(value) is not float or not 0 < value < math.inf:
        raise CheckpointError(f"{key}={value!r}; expected a positive number")
    return _shortest(value)


def _shortest(value: Any) -> Any:
    """The number that was written before it became a float32."""
    return float(str(np.float32(value)))
