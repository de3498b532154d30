"""Round to nearest: the codes and scales of a matrix of numbers.

`scale = max|w| / largest code` of each group, `code = round(w / scale)`. NumPy in and out where the matrix is NumPy's,
JAX where it is JAX's, so that random weights are rounded where they lie.

Dimension letters: K inputs, J groups of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.config.quantization import Scheme

_LARGEST = {"uint4": 7.0, "int8": 127.0, "float8_e4m3fn": 448.0}
_TINY = 1e-10  # a group of zeros has a scale, too


@dataclass(frozen=True, slots=True)
class Pieces:
    """A box of a quantised matrix, codes unpacked; K is whole where a scale belongs to all inputs.

    Attributes:
        codes: `[.., K, ..]` uint8 (4-bit codes), int8 or float8.
        scales, minima: `[.., J, ..]` float.
        order: `[.., K]`, see `QuantizedMatrix`.
        input_scale: of static activations.
    """

    codes: Any
    scales: Any
    minima: Any = None
    order: Any = None
    input_scale: Any = None


def merged_inputs(values: np.ndarray, inputs: tuple[int, ...]) -> np.ndarray:
    """`values` with their input dims (neighbours) as one."""
    first, end = inputs[0], inputs[-1] + 1
    return values.reshape(*values.shape[:first], -1, *values.shape[end:])


def round_to_nearest(values: Any, scheme: Scheme, axis: int) -> Pieces:
    """The pieces of `values` (inputs are dim `axis`). Raises ValueError where groups do not divide the inputs."""
    xp: Any = jnp if isinstance(values, jax.Array) else np
    size = values.shape[axis]
    group = scheme.group or size
    if size % group:
        raise ValueError(f"{size} inputs do not divide into groups of {group}")
    lead, kept = values.shape[:axis], values.shape[axis + 1 :]
    grouped = values.astype(np.float32).reshape(*lead, size // group, group, *kept)
    scales = kept_scales(xp.max(xp.abs(grouped), axis=axis + 1) / largest_code(scheme), scheme, xp)
    codes = codes_of(grouped / xp.expand_dims(scales, axis + 1), scheme, xp)
    return Pieces(codes.reshape(values.shape), scales)


def largest_code(scheme: Scheme) -> float:
    """The number that the largest of a group becomes."""
    return _LARGEST[scheme.codes]


def kept_scales(scales: Any, scheme: Scheme, xp: Any = np) -> Any:
    """float32 scales as they will be kept: codes are those of these."""
    scales = xp.maximum(scales, _TINY / largest_code(scheme))
    return xp.maximum(scales.astype(scheme.scale_dtype).astype(np.float32), _TINY)


def codes_of(scaled: Any, scheme: Scheme, xp: Any = np) -> Any:
    """The nearest codes of numbers that were divided by their scale."""
    largest = largest_code(scheme)
    if scheme.codes == "float8_e4m3fn":
        return xp.clip(scaled, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
    least = -largest - (scheme.codes == "uint4")
    codes = xp.clip(xp.round(scaled), least, largest) + scheme.offset
    return codes.astype(np.uint8 if scheme.codes == "uint4" else np.int8)


def numbers_of(codes: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The float32 numbers that codes stand for, before they are scaled."""
    numbers = codes.astype(np.float32)
    return numbers - np.float32(scheme.offset) if scheme.offset else numbers
