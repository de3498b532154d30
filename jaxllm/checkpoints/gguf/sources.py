"""Tensors as Hugging Face has them, made of those of GGUF files: rows reordered, experts apart, halves joined.

A source is read in part: an index of slices touches (and dequantises) only the rows that it needs where the two
layouts allow that. Knows nothing of architectures or names.

Dimension letters: N heads, H head width, R compressed width, F feed-forward width, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.gguf.file import GGUFTensor
from jaxllm.checkpoints.gguf.parts import GGUFPart
from jaxllm.checkpoints.mapped import release_pages

Index = tuple[slice | np.ndarray, ...]

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Source(Protocol):
    """A tensor that can be read in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: Index = ()) -> np.ndarray:
        """The part that `index` selects: slices for the leading dims (the first may be an array of rows)."""
        ...

    def release(self) -> None:
        """Its pages need not stay in memory."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: a view where it is plain, float32 where it is made of blocks."""

    tensor: GGUFTensor
    part: GGUFPart

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return _PLAIN.get(self.tensor.type, np.dtype("f4"))

    def read(self, index: Index = ()) -> np.ndarray:
        tensor = self.tensor
        raw = self.part.data[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.type in _PLAIN:
            return raw.view(self.dtype).reshape(tensor.shape)[index]
        if len(tensor.shape) == 1:  # one row of blocks: nothing to choose before dequantising
            return _dequantize(raw, tensor.type)[index]
        last = len(tensor.shape) - 1
        rows = raw.reshape(*tensor.shape[:-1], -1)[index[:last]]
        return _dequantize(rows, tensor.type)[(..., *index[last:])]

    def release(self) -> None:
        self.release_range(0, self.tensor.nbytes)

    def release_range(self, start: int, num_bytes: int) -> None:
        """As `release`, for some of its bytes."""
        release_pages(self.part.mapping, self.tensor.offset + start, num_bytes)


@dataclass(frozen=True, slots=True)
class Unrotated:
    """Rows of queries or keys in Hugging Face's order.

    Hugging Face rotates dim j of a head with j + H/2, so a head's rows are its first halves, then its second halves;
    GGUF's llama rotates neighbours, so there they alternate.
    """

    source: Source
    num_heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        order = np.arange(self.shape[0]).reshape(self.num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return self.source.read((order[index[:1]], *index[1:]))

    def release(self) -> None:
        self.source.release()


@dataclass(frozen=True, slots=True)
class Expert:
    """One of the matrices (or vectors) that are stacked in the first dim."""

    source: Stored
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        return self.source.read((slice(self.number, self.number + 1), *index))[0]

    def release(self) -> None:
        size = self.source.tensor.nbytes // self.source.shape[0]
        self.source.release_range(self.number * size, size)


@dataclass(frozen=True, slots=True)
class Transposed:
    """The last two dims exchanged."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.source.shape
        return (*lead, columns, rows)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, rows, columns = whole(index, self.shape)
        return self.source.read((*lead, columns, rows)).swapaxes(-1, -2)

    def release(self) -> None:
        self.source.release()


@dataclass(frozen=True, slots=True)
class Rows:
    """Some neighbouring rows of a tensor."""

    source: Source
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.source.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        chosen = np.arange(self.start, self.stop)[index[:1]]
        return self.source.read((chosen, *index[1:]))

    def release(self) -> None:
        self.source.release()


@dataclass(frozen=True, slots=True)
class Stacked:
    """Two tensors one above the other in the last dim but one."""

    sources: tuple[Source, Source]

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, columns = self.sources[0].shape
        return (*lead, rows + self.sources[1].shape[-2], columns)

    @property
    def dtype(self) -> np.dtype:
        return common_dtype(self.sources)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, rows, columns = whole(index, self.shape)
        both = [source.read((*lead, slice(None), columns)).astype(self.dtype, copy=False) for source in self.sources]
        return np.concatenate(both, axis=-2)[..., rows, :]

    def release(self) -> None:
        for source in self.sources:
            source.release()


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Two tensors that alternate in the last dim (gpt-oss: gate, up, gate, up, ...)."""

    sources: tuple[Source, Source]

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, size = self.sources[0].shape
        return (*lead, 2 * size)

    @property
    def dtype(self) -> np.dtype:
        return common_dtype(self.sources)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, wanted = whole(index, self.shape)
        pairs, cut = covering(wanted, self.shape[-1], 2)
        halves = [source.read((*lead, pairs)).astype(self.dtype, copy=False) for source in self.sources]
        both = np.stack(halves, axis=-1)
        return both.reshape(*both.shape[:-2], 2 * both.shape[-2])[..., cut]

    def release(self) -> None:
        for source in self.sources:
            source.release()


@dataclass(frozen=True, slots=True)
class KeysAndValues:
    """DeepSeek's `kv_b_proj` `[N * (K + V), R]`, of keys `[N, R, K]` and values `[N, V, R]`: head by head, both."""

    keys: Source
    values: Source

    @property
    def shape(self) -> tuple[int, ...]:
        heads, rank, width = self.keys.shape
        return (heads * (width + self.values.shape[1]), rank)

    @property
    def dtype(self) -> np.dtype:
        return common_dtype((self.keys, self.values))

    def read(self, index: Index = ()) -> np.ndarray:
        rows, columns = whole(index, self.shape)
        heads, cut = covering(rows, self.shape[0], self.shape[0] // self.keys.shape[0])
        keys = self.keys.read((heads,)).swapaxes(1, 2).astype(self.dtype, copy=False)
        values = self.values.read((heads,)).astype(self.dtype, copy=False)
        both = np.concatenate((keys, values), axis=1)
        return both.reshape(both.shape[0] * both.shape[1], both.shape[2])[cut, columns]

    def release(self) -> None:
        self.keys.release()
        self.values.release()


@dataclass(frozen=True, slots=True)
class Shifted:
    """A constant taken off every element (Gemma's norms are stored as 1 + w)."""

    source: Source
    amount: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        value = self.source.read(index)
        return value - value.dtype.type(self.amount)

    def release(self) -> None:
        self.source.release()


@dataclass(frozen=True, slots=True)
class OneRow:
    """A vector as a matrix with one row."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.source.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        return self.source.read(index[1:])[None][index[:1]]

    def release(self) -> None:
        self.source.release()


@dataclass(frozen=True, slots=True)
class Zeros:
    """What a file leaves out because it changes nothing: a bias that others of the layer have."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("f4")

    def read(self, index: Index = ()) -> np.ndarray:
        return np.zeros(self.shape, self.dtype)[index]

    def release(self) -> None:
        """Nothing is mapped."""


def whole(index: Index, shape: tuple[int, ...]) -> list[slice]:
    """A slice for every dim."""
    given = [part for part in index if isinstance(part, slice)]
    assert len(given) == len(index), "rows by number only where no dims are exchanged"
    return given + [slice(None)] * (len(shape) - len(given))


def covering(wanted: slice, size: int, group: int) -> tuple[slice, slice]:
    """The groups of `group` neighbours that `wanted` touches, and what it selects of them."""
    chosen = range(*wanted.indices(size))
    if not chosen:
        return slice(0, 0), slice(0, 0)
    first, last = min(chosen) // group, max(chosen) // group
    start, stop = chosen.start - first * group, chosen.stop - first * group
    return slice(first, last + 1), slice(start, None if stop < 0 else stop, chosen.step)


def common_dtype(sources: Sequence[Source]) -> np.dtype:
    """The dtype that the sources share, else float32."""
    kinds = {source.dtype for source in sources}
    return kinds.pop() if len(kinds) == 1 else np.dtype("f4")


def _dequantize(rows: np.ndarray, type_name: str) -> np.ndarray:
    import gguf.quants  # only quantised files need it

    kind = gguf.GGMLQuantizationType[type_name]
    if not rows.size:
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return np.empty((*rows.shape[:-1], rows.shape[-1] // block_bytes * block_elements), np.float32)
    with np.errstate(all="ignore"):  # a scale that is not finite gives weights that are not, as it would in F32
        return gguf.quants.dequantize(rows, kind)
