"""GGUF tensors kept quantised: what Hugging Face's tensors are made of (`sources`), read as codes, scales and minima.

The same reordering of rows holds for all three: a source made of stored tensors is one made of their codes. Tensors
that mix inputs of several blocks, or add to values, are not kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.blocks import KINDS, Decode
from jaxllm.checkpoints.gguf.ggml_types import TENSOR_TYPES
from jaxllm.checkpoints.gguf.sources import (
    Expert,
    Index,
    Interleaved,
    Rows,
    Source,
    Stacked,
    Stored,
    Transposed,
    Unrotated,
)
from jaxllm.config.quantization import Scheme

_BLOCK = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Decoded:
    """Something of every block of a stored tensor, in place of its values: `per_block` numbers of each."""

    stored: Stored
    decode: Decode
    per_block: int

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size = self.stored.shape
        return (*lead, size // _BLOCK[self.stored.tensor.type][0] * self.per_block)

    @property
    def dtype(self) -> np.dtype:
        return self.read((slice(0, 0),)).dtype

    def read(self, index: Index = ()) -> np.ndarray:
        tensor, last = self.stored.tensor, len(self.stored.shape) - 1
        raw = self.stored.part.data[tensor.offset : tensor.offset + tensor.nbytes]
        rows = raw.reshape(*tensor.shape[:-1], -1)[index[:last]]
        values = self.decode(rows.reshape(*rows.shape[:-1], -1, _BLOCK[tensor.type][1]))
        return values.reshape(*rows.shape[:-1], -1)[(..., *index[last:])]

    def release(self) -> None:
        self.stored.release()


@dataclass(frozen=True, slots=True)
class GGUFQuantized:
    """See `QuantizedTensor`."""

    name: str
    source: Source
    scheme: Scheme
    axis: int
    parts: Mapping[str, Source]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def codes(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.parts["codes"].read(index)

    def scales(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._finite(self.parts["scales"].read(index))

    def minima(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._finite(self.parts["minima"].read(index))

    def order(self) -> np.ndarray:
        raise AssertionError("inputs are in their order")

    def input_scale(self) -> float:
        raise AssertionError("activations stay as they are")

    def release(self) -> None:
        self.source.release()

    def _finite(self, values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all():
            raise CheckpointError(f"tensor {self.name} has scales that are no finite numbers: the file is damaged")
        return values


def quantized_sources(sources: Mapping[str, Source]) -> dict[str, GGUFQuantized]:
    """Those that can be kept as the file has them."""
    made = {name: _quantized(name, source) for name, source in sources.items() if len(source.shape) > 1}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _quantized(name: str, source: Source) -> GGUFQuantized | None:
    found = _leaves(source)
    types = set() if found is None else {stored.tensor.type for stored in found}
    if len(types) != 1 or (kind := KINDS.get(next(iter(types)))) is None:
        return None
    elements = _BLOCK[next(iter(types))][0]
    groups = elements // kind.scheme.group
    parts = {"codes": _over(source, kind.codes, elements), "scales": _over(source, kind.scales, groups)}
    if kind.minima is not None:
        parts["minima"] = _over(source, kind.minima, groups)
    return GGUFQuantized(name, source, kind.scheme, _axis(source), parts)


def _leaves(source: Source) -> list[Stored] | None:
    """The stored tensors; None where their blocks do not lie along what one dim keeps."""
    if isinstance(source, Stored):
        return [source] if len(source.shape) > 1 else None
    if isinstance(source, Unrotated | Rows | Expert | Transposed):
        return _leaves(source.source)
    if isinstance(source, Stacked | Interleaved):
        halves = [_leaves(half) for half in source.sources]
        is_sound = isinstance(source, Stacked) != isinstance(source.sources[0], Transposed)
        return halves[0] + halves[1] if is_sound and halves[0] and halves[1] else None
    return None


def _over(source: Source, decode: Decode, per_block: int) -> Source:
    if isinstance(source, Stored):
        return Decoded(source, decode, per_block)
    if isinstance(source, Stacked | Interleaved):
        first, second = (_over(half, decode, per_block) for half in source.sources)
        return dataclasses.replace(source, sources=(first, second))
    return dataclasses.replace(source, source=_over(source.source, decode, per_block))  # type: ignore[attr-defined]


def _axis(source: Source) -> int:
    """Which dim the inputs are."""
    inner = source
    while not isinstance(inner, Stored | Transposed):
        inner = inner.sources[0] if isinstance(inner, Stacked | Interleaved) else inner.source  # type: ignore[attr-defined]
    return len(source.shape) - (2 if isinstance(inner, Transposed) else 1)
