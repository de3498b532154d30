"""Keeping a parameter whose parts a checkpoint has in different ways (`jaxllm.ops.joined`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.ops.joined import JoinedMatrix
from jaxllm.weights.boxes import Box
from jaxllm.weights.storage import Storage


@dataclass(frozen=True, slots=True)
class Joined:
    """See `jaxllm.weights.stored.Storage`.

    Attributes:
        axis: the dim of the parameter along which its parts follow each other; no mesh cuts it.
        runs: the first index of each part, and how that is kept.
    """

    axis: int
    runs: tuple[tuple[int, Storage], ...]

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> JoinedMatrix:
        """See `Storage`."""
        parts = [storage.abstract(part, sharding) for _, part, storage in self._parts(want)]
        return JoinedMatrix(tuple(parts), self.axis)

    def from_pieces(
        self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding, read: Callable[[Box], Any]
    ) -> JoinedMatrix:
        """`read` gets boxes of the parameter that lie in one part."""

        def reader(start: int) -> Callable[[Box], Any]:
            def shifted(box: Box) -> Any:
                own = box[self.axis]
                moved = slice(own.start + start, own.stop + start)
                return read((*box[: self.axis], moved, *box[self.axis + 1 :]))

            return shifted

        parts = [storage.from_pieces(part, sharding, reader(start)) for start, part, storage in self._parts(want)]
        return JoinedMatrix(tuple(parts), self.axis)

    def from_array(self, array: jax.Array, sharding: jax.sharding.NamedSharding) -> JoinedMatrix:
        """See `Storage`."""
        cuts = [start for start, _ in self.runs[1:]]
        parts = jax.numpy.split(array, np.array(cuts), axis=self.axis)
        made = [storage.from_array(part, sharding) for part, (_, storage) in zip(parts, self.runs, strict=True)]
        return JoinedMatrix(tuple(made), self.axis)

    def _parts(self, want: jax.ShapeDtypeStruct) -> list[tuple[int, jax.ShapeDtypeStruct, Storage]]:
        ends = [*(start for start, _ in self.runs[1:]), want.shape[self.axis]]
        shapes = [
            (*want.shape[: self.axis], end - start, *want.shape[self.axis + 1 :])
            for (start, _), end in zip(self.runs, ends, strict=True)
        ]
        structs = [jax.ShapeDtypeStruct(shape, want.dtype) for shape in shapes]
        return [(start, struct, storage) for (start, storage), struct in zip(self.runs, structs, strict=True)]
