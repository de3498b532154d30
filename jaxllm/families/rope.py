"""Rotary scalings as `rope_scaling` or `rope_parameters` of a `config.json` describe them.

One dict of keys -> one frozen dataclass. A kind that is not known is refused by name; a key that the kind does not use
is named in the log and ignored, as in transformers. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxllm.config import DynamicScaling, LinearScaling, LongRopeScaling, RopeScaling, Scaling, YarnScaling
from jaxllm.families.notices import say_once

_HUGE = 1e30  # no number of a configuration comes near; infinite ones and NaN do not compare below it


def rope_scaling(
    parameters: Mapping[str, Any], max_positions: int | None = None, original: int | None = None
) -> Scaling | None:
    """The scaling that rope parameters (without their theta) describe.

    Args:
        parameters: the keys and values.
        max_positions: `max_position_embeddings` of the model.
        original: `original_max_position_embeddings` where it stands beside the parameters; it has priority, as in
            transformers.

    Raises:
        ValueError: the kind is not known, or a number is missing or makes no sense.
    """
    left = {key: value for key, value in parameters.items() if value is not None}
    kind = left.pop("rope_type", None) or left.pop("type", None) or "default"
    left.pop("type", None)
    if left.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor in the rope parameters is not supported by this family")
    scaling = None
    if kind != "default":
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"rope_type={kind!r} is not supported; supported are default, {', '.join(_KINDS)}")
        length = original or left.pop("original_max_position_embeddings", None) or max_positions
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"the rope parameters have original_max_position_embeddings={length!r}; expected a length")
        try:
            scaling = _KINDS[kind](left, length, max_positions)
        except ValueError as error:
            raise ValueError(f"rope_type={kind!r}: {error}") from None
    left.pop("original_max_position_embeddings", None)
    if left:
        say_once(f"rope_type={kind!r} does not use {', '.join(sorted(left))} of the rope parameters; ignored")
    return scaling


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's growth of the scores with the stretch: `0.1 w ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _linear(left: dict[str, Any], original: int, longest: int | None) -> LinearScaling:
    return LinearScaling(factor=_number(left, "factor"))


def _dynamic(left: dict[str, Any], original: int, longest: int | None) -> DynamicScaling:
    return DynamicScaling(factor=_number(left, "factor"), original_max_position=int(longest or original))


def _llama3(left: dict[str, Any], original: int, longest: int | None) -> RopeScaling:
    low, high = _number(left, "low_freq_factor"), _number(left, "high_freq_factor")
    if high <= low:
        raise ValueError(
            f"the rope parameters have high_freq_factor={high} and low_freq_factor={low}; the first is more"
        )
    return RopeScaling(
        factor=_number(left, "factor"), low_freq_factor=low, high_freq_factor=high, original_max_position=original
    )


def _yarn(left: dict[str, Any], original: int, longest: int | None) -> YarnScaling:
    """The growth of the scores is given, or follows from the stretch and, where both are given, two weights of it."""
    factor = _number(left, "factor")
    own, mscale, all_dim = (_number(left, key, 0.0) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    both = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim) if mscale and all_dim else None
    truncate = left.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"the rope parameters have truncate={truncate!r}; true or false is required")
    return YarnScaling(
        factor=factor,
        beta_fast=_number(left, "beta_fast", 0.0) or 32.0,
        beta_slow=_number(left, "beta_slow", 0.0) or 1.0,
        original_max_position=original,
        attention_factor=own or both or yarn_magnitude(factor),
        truncate=truncate,
    )


def _longrope(left: dict[str, Any], original: int, longest: int | None) -> LongRopeScaling:
    """The stretch that the attention factor grows with is the ratio of the two lengths unless `factor` says it."""
    factor = _number(left, "factor", 0.0) or (longest or original) / original
    attention = _number(left, "attention_factor", 0.0)
    if not attention and factor > 1 and original == 1:
        raise ValueError("the rope parameters need attention_factor where original_max_position_embeddings is 1")
    if not attention:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=_numbers(left, "short_factor"),
        long_factors=_numbers(left, "long_factor"),
        original_max_position=original,
        attention_factor=attention,
    )


_KINDS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _number(left: dict[str, Any], key: str, default: float | None = None) -> float:
    """A number above 0; 0 is taken where it is the default, which stands for a missing one."""
    value = left.pop(key, default)
    if value is None:
        raise ValueError(f"the rope parameters lack {key!r}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _HUGE or value == 0 != default:
        raise ValueError(f"the rope parameters have {key}={value!r}; a number above 0 is required")
    return float(value)


def _numbers(left: dict[str, Any], key: str) -> tuple[float, ...]:
    values = left.pop(key, None)
    if not isinstance(values, list):
        raise ValueError(f"the rope parameters have {key}={values!r}; a list of numbers is required")
    return tuple(_number({key: value}, key) for value in values)
