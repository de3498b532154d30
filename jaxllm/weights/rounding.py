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
    largest = _LARGEST[scheme.codes]
    scales = xp.maximum(xp.max(xp.abs(grouped), axis=axis + 1), _TINY) / largest
    scales = scales.astype(scheme.scale_dtype).astype(np.float32)  # codes are those of the scale that is kept
    scales = xp.maximum(scales, _TINY)
    scaled = grouped / xp.expand_dims(scales, axis + 1)
    if scheme.codes == "float8_e4m3fn":
        codes = xp.clip(scaled, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
    else:
        least = -largest - (scheme.codes == "uint4")
        codes = xp.clip(xp.round(scaled), least, largest) + scheme.offset
        codes = codes.astype(np.uint8 if scheme.codes == "uint4" else np.int8)
    return Pieces(codes.reshape(values.shape), scales)
