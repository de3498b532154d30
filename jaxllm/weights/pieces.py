"""Boxes of a parameter out of a checkpoint's quantised tensors: their codes, scales and minima, put where the
parameter's dims want them.

What a family says of where a parameter's values come from (`Source`) holds for codes; for scales it does with the
inputs counted in groups. Inputs are one dim here, as in `jaxllm.ops.quantized`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxllm.checkpoints.quantized import QuantizedTensor
from jaxllm.config.quantization import Scheme
from jaxllm.families.sources import Box, Part, Read, Source
from jaxllm.weights.rounding import Pieces

_PIECE_ELEMENTS = 1 << 21  # codes of a tensor handled at a time


def merged_part(part: Part, inputs: tuple[int, ...], unit: int = 1) -> tuple[Part, int]:
    """The part with its inputs as one dim, counted in units, and which dim of the tensor they are.

    Raises ValueError where the part is not whole linears, whose inputs are one dim of their tensor.
    """
    axes = [part.order[i] for i in inputs]
    first, size = axes[0], math.prod(part.view[axis] for axis in axes)
    dim = _dim_of(part, first)
    rows = _tensor_rows(part)
    is_whole = axes == list(range(first, first + len(axes))) and rows[dim] == size and not (part.rows and dim == 0)
    if not is_whole or any(part.start[i] for i in inputs) or (part.repeat and part.repeat[0] in inputs):
        raise ValueError(f"tensor {part.name}: its inputs are not in one piece")
    fewer = len(axes) - 1
    order = [axis - fewer if axis > first else axis for i, axis in enumerate(part.order) if i not in inputs[1:]]
    repeat = part.repeat and (part.repeat[0] - (fewer if part.repeat[0] > inputs[0] else 0), part.repeat[1])
    made = dataclasses.replace(
        part,
        shape=tuple(n // unit if i == dim else n for i, n in enumerate(part.shape)),
        view=(*part.view[:first], size // unit, *part.view[first + fewer + 1 :]),
        order=tuple(order),
        start=tuple(n for i, n in enumerate(part.start) if i not in inputs[1:]),
        repeat=repeat,
    )
    return made, dim


def _tensor_rows(part: Part) -> tuple[int, ...]:
    return (part.rows[1] - part.rows[0], *part.shape[1:]) if part.rows else part.shape


def _dim_of(part: Part, axis: int) -> int:
    """The dim of the tensor that an axis of the view is cut from."""
    end = 0
    for dim, size in enumerate(_tensor_rows(part)):
        product = 1
        while end < len(part.view) and (product < size or part.view[end] == 1 or product == 0):
            product *= part.view[end]
            end += 1
        if axis < end:
            return dim
    raise ValueError(f"tensor {part.name}: no dim holds axis {axis}")


def read_pieces(
    parts: Sequence[Part], box: Box, scheme: Scheme, inputs: tuple[int, ...], tensors: Mapping[str, QuantizedTensor]
) -> Pieces:
    """The box of the parameter, whole groups of inputs."""
    first, end = inputs[0], inputs[-1] + 1
    inner = math.prod(s.stop - s.start for s in box[first + 1 : end])
    start, stop = box[first].start * inner, box[first].stop * inner
    unit = scheme.group or stop - start
    codes_box = (*box[:first], slice(start, stop), *box[end:])
    groups_box = (*box[:first], slice(start // unit, stop // unit), *box[end:])
    codes = _filled(parts, codes_box, inputs, 1, lambda name, index: tensors[name].codes(index))
    scales = _filled(parts, groups_box, inputs, unit, lambda name, index: tensors[name].scales(index))
    minima = order = input_scale = None
    if scheme.has_minima:
        minima = _filled(parts, groups_box, inputs, unit, lambda name, index: tensors[name].minima(index))
    own = [part for part in parts if _overlaps(part, box)]
    if scheme.is_permuted:
        orders = [tensors[part.name].order() for part in own]
        order = _of_experts(orders, first, own)
    if scheme.activations is not None and scheme.activations.is_static:
        input_scale = max(tensors[part.name].input_scale() for part in own)
    for part in own:
        tensors[part.name].release()
    return Pieces(codes, scales, minima, order, input_scale)


def _overlaps(part: Part, box: Box) -> bool:
    shape = part.box_shape
    return all(b.start < s + n and s < b.stop for b, s, n in zip(box, part.start, shape, strict=True))


def _of_experts(orders: list[np.ndarray], lead: int, parts: Sequence[Part]) -> np.ndarray:
    """One order for all that a matrix keeps, for each expert its own."""
    if lead == 0:
        if any((order != orders[0]).any() for order in orders):
            raise ValueError(f"tensors {', '.join(part.name for part in parts)}: their g_idx differ")
        return orders[0]
    return np.stack(orders)


def _filled(parts: Sequence[Part], box: Box, inputs: tuple[int, ...], unit: int, read: Read) -> np.ndarray:
    source = Source(tuple(merged_part(part, inputs, unit)[0] for part in parts))
    out: np.ndarray | None = None
    for _, target, value in source.pieces(box, read, _PIECE_ELEMENTS):
        if out is None:  # padding rows come from no tensor: zeros
            out = np.zeros([part.stop - part.start for part in box], value.dtype)
        out[target] = value
    assert out is not None, "a box beyond all parts"
    return out
