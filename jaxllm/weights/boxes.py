"""Boxes of a matrix that are whole panels of it, read one at a time while its panels are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxllm.ops.cpu.packed import PANEL

Box = tuple[slice, ...]
ReadBox = Callable[[Box], np.ndarray]
_PIECE_BYTES = 1 << 20  # of a matrix that exist beside its panels while these are made


def panel_boxes(want: jax.ShapeDtypeStruct, contracted: tuple[int, ...]) -> Iterator[Box]:
    """Boxes that are whole panels, in their order: runs of the kept dims, cut at the first dim that can be."""
    kept = [i for i in range(len(want.shape)) if i not in contracted]
    sizes = [want.shape[i] for i in kept]
    column = want.dtype.itemsize * math.prod(want.shape) // math.prod(sizes)
    columns = max(PANEL, _PIECE_BYTES // column)
    for ranges in _runs(sizes, columns):
        box = [slice(0, size) for size in want.shape]
        for dim, part in zip(kept, ranges, strict=True):
            box[dim] = part
        yield tuple(box)


def _runs(sizes: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cut an index space into runs of about `most` indices, each a whole number of panels; all of it if none fits."""
    inner = math.prod(sizes[1:])
    step = max(1, most // inner)
    unit = PANEL // math.gcd(inner, PANEL)  # indices of the first dim that make whole panels
    step = -(-step // unit) * unit
    if not sizes or (step >= sizes[0] and (len(sizes) == 1 or inner % PANEL or inner <= most)):
        yield tuple(slice(0, size) for size in sizes)
    elif inner > most and inner % PANEL == 0:
        for i in range(sizes[0]):
            for rest in _runs(sizes[1:], most):
                yield (slice(i, i + 1), *rest)
    else:
        for low in range(0, sizes[0], step):
            yield (slice(low, min(low + step, sizes[0])), *(slice(0, size) for size in sizes[1:]))
