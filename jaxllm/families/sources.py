"""Where a decoder parameter comes from: boxes of the parameter that are views of checkpoint tensors.

Data only, so that it can be read in both directions and in part: a shard reads the slices it needs and nothing
else, and a parameter can be written back as the tensors it came from.

Dimension letters: D model width, F feed-forward width, N query heads, K key/value heads, G query heads per
key/value head, H head width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.config import ModelConfig

Path = tuple[str | int, ...]
Box = tuple[slice, ...]
Read = Callable[[str, Box], np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of the checkpoint, or rows of it, as a box of a parameter.

    Attributes:
        name, shape: the whole tensor in the checkpoint.
        rows: the rows that are meant, where several parts share a tensor; None = all.
        view: the shape those rows are seen in; each dim of the tensor is split into whole dims of the view.
        order: the permutation of the view's dims that gives the parameter's dims.
        start: where the box begins in the parameter.
        repeat: (dim, times): each index of this dim of the parameter appears `times` times in a row.
    """

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    start: tuple[int, ...]
    rows: tuple[int, int] | None = None
    repeat: tuple[int, int] | None = None

    @property
    def box_shape(self) -> tuple[int, ...]:
        """Shape of the box in the parameter."""
        shape = [self.view[axis] for axis in self.order]
        if self.repeat:
            shape[self.repeat[0]] *= self.repeat[1]
        return tuple(shape)

    def read(self, read: Read, box: Box) -> np.ndarray:
        """The part of this box that `box` (counted from the box's own start) selects."""
        source, trim = list(box), None
        if self.repeat:
            dim, times = self.repeat
            first, stop = box[dim].start // times, -(-box[dim].stop // times)
            source[dim], trim = slice(first, stop), slice(box[dim].start - first * times, box[dim].stop - first * times)
        wanted = [slice(0, 0)] * len(self.view)
        for axis, part in zip(self.order, source, strict=True):
            wanted[axis] = part
        value = self._read_view(read, wanted).transpose(self.order)
        if self.repeat and trim is not None:
            dim, times = self.repeat
            value = np.repeat(value, times, axis=dim)[(*(slice(None),) * dim, trim)]
        return value

    def split(self, box: Box, max_elements: int) -> Iterator[Box]:
        """Cut `box` along the dim that the tensor's rows make, so that each piece is a run of the file."""
        end = _group_end(self.view, 0, self._tensor_rows())
        lead = next((axis for axis in range(end) if self.view[axis] > 1), 0)
        dim = self.order.index(lead)
        start, stop = box[dim].start, box[dim].stop
        per_row = math.prod(s.stop - s.start for s in box) // max(1, stop - start)
        step = max(1, max_elements // max(1, per_row))
        for low in range(start, stop, step):
            yield (*box[:dim], slice(low, min(low + step, stop)), *box[dim + 1 :])

    def _read_view(self, read: Read, wanted: list[slice]) -> np.ndarray:
        """Read the smallest box of the tensor that covers `wanted` of the view, and cut it down to that."""
        index, view, cut, axis = [], [], [], 0
        rows = self._tensor_rows()
        for dim in range(len(rows)):
            stop = _group_end(self.view, axis, rows[dim:])
            lead = axis
            while lead < stop - 1 and self.view[lead] == 1:
                lead += 1
            inner = math.prod(self.view[lead + 1 : stop])
            offset = self.rows[0] if self.rows and dim == 0 else 0
            chosen = wanted[lead]
            index.append(slice(offset + chosen.start * inner, offset + chosen.stop * inner))
            view += [*self.view[axis:lead], chosen.stop - chosen.start, *self.view[lead + 1 : stop]]
            cut += [slice(None)] * (lead - axis + 1) + wanted[lead + 1 : stop]
            axis = stop
        return read(self.name, tuple(index)).reshape(view)[tuple(cut)]

    def _tensor_rows(self) -> tuple[int, ...]:
        return (self.rows[1] - self.rows[0], *self.shape[1:]) if self.rows else self.shape

    def write(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """The reverse: fill the tensor's rows from the whole parameter."""
        box = parameter[tuple(slice(s, s + n) for s, n in zip(self.start, self.box_shape, strict=True))]
        if self.repeat:
            box = box[(*(slice(None),) * self.repeat[0], slice(None, None, self.repeat[1]))]
        rows = slice(*self.rows) if self.rows else slice(None)
        tensor[rows] = box.transpose(np.argsort(self.order)).reshape(self._tensor_rows())


def _group_end(view: tuple[int, ...], axis: int, sizes: tuple[int, ...]) -> int:
    """The end of the dims of the view, from `axis` on, that the first of these dims of a tensor is split into."""
    size, stop, product = sizes[0], axis + 1, view[axis]
    takes_ones = sizes[1:2] != (1,)  # those of the view belong to the dim before them, unless the next is one itself
    while product < size or (takes_ones and stop < len(view) and view[stop] == 1):
        product *= view[stop]
        stop += 1
    assert product == size, (view, axis, size)
    return stop


@dataclass(frozen=True, slots=True)
class Source:
    """How one decoder parameter is made: its parts, and what is added to all of it (1 for Gemma's norms)."""

    parts: tuple[Part, ...]
    offset: float = 0.0

    def pieces(self, box: Box, read: Read, max_elements: int) -> Iterator[tuple[str, Box, np.ndarray]]:
        """The box of the parameter in pieces of bounded size: tensor, place in the box, values (a view).

        Only what overlaps the box is read.
        """
        for part in self.parts:
            bounds = [
                (max(b.start, s), min(b.stop, s + n)) for b, s, n in zip(box, part.start, part.box_shape, strict=True)
            ]
            if all(low < high for low, high in bounds):
                inside = tuple(slice(low - s, high - s) for (low, high), s in zip(bounds, part.start, strict=True))
                shift = [s - b.start for s, b in zip(part.start, box, strict=True)]
                for piece in part.split(inside, max_elements):
                    value = part.read(read, piece)
                    target = tuple(slice(p.start + n, p.stop + n) for p, n in zip(piece, shift, strict=True))
                    yield part.name, target, value if not self.offset else value.astype(np.float32) + self.offset


WeightMap = dict[Path, Source]


def whole(name: str, *shape: int, offset: float = 0.0) -> Source:
    """The tensor as it is."""
    zero = (0,) * len(shape)
    return Source((Part(name=name, shape=shape, view=shape, order=tuple(range(len(shape))), start=zero),), offset)


def transposed(name: str, rows: int, columns: int) -> Source:
    """A PyTorch linear `[out, in]` as `[in, out]`."""
    return Source((Part(name=name, shape=(rows, columns), view=(rows, columns), order=(1, 0), start=(0, 0)),))


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of the attention parameters on one placement, with key/value heads repeated `copies` times."""

    d: int
    k: int
    g: int
    h: int
    copies: int

    @classmethod
    def of(cls, cfg: ModelConfig, copies: int) -> Heads:
        k = cfg.num_kv_heads
        return cls(cfg.hidden_size, k, cfg.num_heads // k, cfg.head_dim, copies)

    @property
    def grouped(self) -> tuple[int, int]:
        """Key/value heads and queries of each, as the decoder has them."""
        return self.k * self.copies, self.g // self.copies

    @property
    def rows(self) -> tuple[int, int, int]:
        """Output features of the query, key and value projections."""
        return self.k * self.g * self.h, self.k * self.h, self.k * self.h

    @property
    def repeat(self) -> tuple[int, int] | None:
        return (1, self.copies) if self.copies > 1 else None


def qkv(names: tuple[str, str, str], heads: Heads, fused: str | None = None) -> Source:
    """`[D, K, G + 2, H]` from three linears `[out, D]`, or from one that stacks them (`fused`)."""
    (k, g), d, h = heads.grouped, heads.d, heads.h
    parts, begin = [], 0
    for i, (name, rows) in enumerate(zip(names, heads.rows, strict=True)):
        parts.append(
            Part(
                name=fused or name,
                shape=(sum(heads.rows) if fused else rows, d),
                rows=(begin, begin + rows) if fused else None,
                view=(k, g, h, d) if i == 0 else (heads.k, 1, h, d),
                order=(3, 0, 1, 2),
                start=(0, 0, 0 if i == 0 else g + i - 1, 0),
                repeat=heads.repeat if i else None,
            )
        )
        begin += rows
    return Source(tuple(parts))


def qkv_bias(names: tuple[str, str, str], heads: Heads) -> Source:
    """`[K, G + 2, H]` from three biases."""
    (k, g), h = heads.grouped, heads.h
    parts = [
        Part(
            name=name,
            shape=(rows,),
            view=(k, g, h) if i == 0 else (heads.k, 1, h),
            order=(0, 1, 2),
            start=(0, 0 if i == 0 else g + i - 1, 0),
            repeat=(0, heads.copies) if i and heads.copies > 1 else None,
        )
        for i, (name, rows) in enumerate(zip(names, heads.rows, strict=True))
    ]
    return Source(tuple(parts))


def out_projection(name: str, heads: Heads) -> Source:
    """`[K, G, H, D]` from a linear `[D, N * H]`."""
    (k, g), d, h = heads.grouped, heads.d, heads.h
    part = Part(name=name, shape=(d, k * g * h), view=(d, k, g, h), order=(1, 2, 3, 0), start=(0, 0, 0, 0))
    return Source((part,))


def per_head(name: str, heads: Heads, *, keys: bool = False, is_matrix: bool = False) -> Source:
    """`[K, G, H]` (or `[K, 1, H]` for keys) from a vector over all heads, or from a matrix with a row for each."""
    k, g = heads.grouped
    view, repeat = ((heads.k, 1, heads.h), heads.copies) if keys else ((k, g, heads.h), 1)
    shape = (view[0] * view[1], view[2]) if is_matrix else (math.prod(view),)
    part = Part(
        name=name, shape=shape, view=view, order=(0, 1, 2), start=(0, 0, 0), repeat=(0, repeat) if repeat > 1 else None
    )
    return Source((part,))


def gate_up(gate: str, up: str, d: int, f: int) -> Source:
    """`[D, 2, F]` from two linears `[F, D]`."""
    parts = [
        Part(name=name, shape=(f, d), view=(1, f, d), order=(2, 0, 1), start=(0, i, 0))
        for i, name in enumerate((gate, up))
    ]
    return Source(tuple(parts))


def gate_up_bias(gate: str, up: str, f: int) -> Source:
    """`[2, F]` from two biases."""
    return Source(
        tuple(Part(name=name, shape=(f,), view=(1, f), order=(0, 1), start=(i, 0)) for i, name in enumerate((gate, up)))
    )


def fused_gate_up(name: str, d: int, f: int) -> Source:
    """`[D, 2, F]` from one linear `[2 * F, D]` that stacks gate and up."""
    return Source((Part(name=name, shape=(2 * f, d), view=(2, f, d), order=(2, 0, 1), start=(0, 0, 0)),))


def expert_gate_up(names: Callable[[int], tuple[str, str]], num_experts: int, d: int, f: int) -> Source:
    """`[E, D, 2, F]` from two linears `[F, D]` per expert."""
    parts = [
        Part(name=name, shape=(f, d), view=(1, 1, f, d), order=(0, 3, 1, 2), start=(e, 0, i, 0))
        for e in range(num_experts)
        for i, name in enumerate(names(e))
    ]
    return Source(tuple(parts))


def expert_down(name: Callable[[int], str], num_experts: int, d: int, f: int) -> Source:
    """`[E, F, D]` from a linear `[D, F]` per expert."""
    parts = [
        Part(name=name(e), shape=(d, f), view=(1, d, f), order=(0, 2, 1), start=(e, 0, 0)) for e in range(num_experts)
    ]
    return Source(tuple(parts))


def checkpoint_tensors(weights: Mapping[Path, Source]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the map needs, with its shape; a tensor that several parts share comes several times."""
    for source in weights.values():
        for part in source.parts:
            yield part.name, part.shape
