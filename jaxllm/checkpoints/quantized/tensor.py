"""A tensor that a checkpoint keeps quantised, whatever the format: codes, scales, minima, read in part.

Dimension letters: K inputs of the linear, J groups of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.checkpoints.base import Checkpoint
    from jaxllm.config.quantization import Scheme

Index = tuple[slice, ...]


class QuantizedTensor(Protocol):
    """One tensor of a layer. Indices are slices of every dim; along the inputs in units of what is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values."""
        ...

    @property
    def axis(self) -> int:
        """Which dim its inputs are."""
        ...

    @property
    def scheme(self) -> Scheme: ...

    def codes(self, index: Index) -> np.ndarray:
        """`[.., K, ..]`, one code in each element, inputs in the order of `order`."""
        ...

    def scales(self, index: Index) -> np.ndarray:
        """float32 `[.., J, ..]`. Raises ValueError where one is no number."""
        ...

    def minima(self, index: Index) -> np.ndarray:
        """float32 `[.., J, ..]`."""
        ...

    def order(self) -> np.ndarray:
        """int32 `[K]`: which input each code belongs to, where the scheme is permuted."""
        ...

    def input_scale(self) -> float:
        """Of static activations."""
        ...

    def release(self) -> None:
        """Its pages need not stay in memory."""
        ...


def quantized_tensors(checkpoint: Checkpoint) -> Mapping[str, QuantizedTensor]:
    """The tensors of a checkpoint that it keeps quantised, by their names in it."""
    return getattr(checkpoint, "quantized", {})


def method_of(checkpoint: Checkpoint) -> str | None:
    """How a checkpoint is quantised: one of `METHODS`, None where it is not."""
    return getattr(checkpoint, "method", None)


def dequantized(tensor: QuantizedTensor, index: Index) -> np.ndarray:
    """float32 values: the box that `index` selects, whole groups read around it."""
    import numpy as np

    scheme, axis = tensor.scheme, tensor.axis
    box = [slice(*part.indices(size)[:2]) for part, size in zip(index, tensor.shape, strict=True)]
    size, wanted = tensor.shape[axis], box[axis]
    group = scheme.group or size
    first, last = wanted.start // group, -(-wanted.stop // group)
    if scheme.is_permuted:
        first, last = 0, size // group
    codes = tensor.codes((*box[:axis], slice(first * group, last * group), *box[axis + 1 :]))
    groups = (*box[:axis], slice(first, last), *box[axis + 1 :])
    numbers = np.asarray(scheme.table, np.float32)[codes] if scheme.table else codes.astype(np.float32) - scheme.offset
    shape = (*codes.shape[:axis], last - first, group, *codes.shape[axis + 1 :])
    values = numbers.reshape(shape) * np.expand_dims(tensor.scales(groups), axis + 1)
    if scheme.has_minima:
        values += np.expand_dims(tensor.minima(groups), axis + 1)
    values = values.reshape(codes.shape)
    if scheme.is_permuted:
        values = np.take(values, np.argsort(tensor.order()), axis)
    cut = slice(wanted.start - first * group, wanted.stop - first * group)
    return values[(*(slice(None),) * axis, cut)]
