"""Rotary scalings as `rope_scaling` or `rope_parameters` of a `config.json` describe them.

One dict of keys -> one frozen dataclass; a kind or a key that is not known is refused by name. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.config import DynamicScaling, LinearScaling, LongRopeScaling, RopeScaling, Scaling, YarnScaling


def rope_scaling(
    parameters: Mapping[str, Any], max_positions: int | None = None, original: int | None = None
) -> Scaling | None:
    """The scaling that rope parameters (without their theta) describe; refused if unknown.

    Args:
        parameters: the keys and values.
        max_positions: `max_position_embeddings` of the model.
        original: `original_max_position_embeddings` where it stands beside the parameters; it has priority, as in
            transformers.
    """
    left = {key: value for key, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", None) or left.pop("type", None) or "default"
    left.pop("type", None)
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor in the rope parameters is not supported by this family")
    if kind == "default":
        return _nothing_left(left, kind, None)
    if kind not in _KINDS:
        raise ValueError(f"rope_type={kind!r} is not supported; supported are default, {', '.join(_KINDS)}")
    length = original or left.pop("original_max_position_embeddings", None) or max_positions
    left.pop("original_max_position_embeddings", None)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"the rope parameters have original_max_position_embeddings={length!r}; expected a length")
    return _nothing_left(left, kind, _KINDS[kind](left, length, max_positions))


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's growth of the scores with the stretch: `0.1 w ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _nothing_left(left: Mapping[str, Any], kind: str, scaling: Scaling | None) -> Scaling | None:
    if left:
        raise ValueError(f"the rope parameters have an unknown field {min(left)!r} for rope_type={kind!r}; refused")
    return scaling


def _linear(left: dict[str, Any], original: int, longest: int | None) -> LinearScaling:
    return LinearScaling(factor=_number(left, "linear", "factor"))


def _dynamic(left: dict[str, Any], original: int, longest: int | None) -> DynamicScaling:
    return DynamicScaling(factor=_number(left, "dynamic", "factor"), original_max_position=int(longest or original))


def _llama3(left: dict[str, Any], original: int, longest: int | None) -> RopeScaling:
    return RopeScaling(
        factor=_number(left, "llama3", "factor"),
        low_freq_factor=_number(left, "llama3", "low_freq_factor"),
        high_freq_factor=_number(left, "llama3", "high_freq_factor"),
        original_max_position=original,
    )


def _yarn(left: dict[str, Any], original: int, longest: int | None) -> YarnScaling:
    factor = _number(left, "yarn", "factor")
    own, mscale, all_dim = (left.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    attention = own
    if own is None:
        attention = yarn_magnitude(factor)
        if mscale and all_dim:
            attention = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return YarnScaling(
        factor=factor,
        beta_fast=float(left.pop("beta_fast", None) or 32.0),
        beta_slow=float(left.pop("beta_slow", None) or 1.0),
        original_max_position=original,
        attention_factor=float(attention),
        truncate=bool(left.pop("truncate", True)),
    )


def _longrope(left: dict[str, Any], original: int, longest: int | None) -> LongRopeScaling:
    """The stretch that the attention factor grows with is the ratio of the two lengths unless `factor` says it."""
    factor = float(left.pop("factor", None) or (longest or original) / original)
    attention = left.pop("attention_factor", None)
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=_numbers(left, "longrope", "short_factor"),
        long_factors=_numbers(left, "longrope", "long_factor"),
        original_max_position=original,
        attention_factor=float(attention),
    )


_KINDS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _number(left: dict[str, Any], kind: str, key: str) -> float:
    if key not in left:
        raise ValueError(f"the rope parameters of rope_type={kind!r} lack {key!r}")
    value = left.pop(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the rope parameters have {key}={value!r}; a number is required")
    return float(value)


def _numbers(left: dict[str, Any], kind: str, key: str) -> tuple[float, ...]:
    values = left.pop(key, None)
    if not isinstance(values, list) or not all(isinstance(v, int | float) and v > 0 for v in values):
        raise ValueError(f"the rope parameters of rope_type={kind!r} need {key!r}, a list of positive numbers")
    return tuple(map(float, values))
