"""Keeping a quantised matrix of one GPU column by column (`jaxllm.ops.quantized_columns`), laid out where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.ops.quantized_columns import QuantizedColumns, lay_columns
from jaxllm.ops.quantized_gpu import unsupported
from jaxllm.weights.boxes import Box
from jaxllm.weights.quantized import LaidOut
from jaxllm.weights.rounding import Pieces


@dataclass(frozen=True, slots=True)
class QuantizedInColumns(LaidOut):
    """Column by column; see `LaidOut`."""

    def fits(self, want: jax.ShapeDtypeStruct, contracted: tuple[int, ...]) -> bool:
        """Whether the kernel knows such codes, and every product sums over the inputs, which come first."""
        k = math.prod(want.shape[i] for i in self.logical.inputs)
        first = self.logical.axis == 0 and contracted == self.logical.inputs
        return first and unsupported(k, math.prod(want.shape) // k, self.scheme) is None

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding) -> QuantizedColumns:
        """See `Storage`."""
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        shapes = jax.eval_shape(lay_columns, self.logical.abstract(want, sharding))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)

    def from_pieces(
        self, want: jax.ShapeDtypeStruct, sharding: NamedSharding, read: Callable[[Box], Pieces]
    ) -> QuantizedColumns:
        """See `Storage`."""
        return _laid(self.logical.from_pieces(want, sharding, read))

    def from_array(self, array: jax.Array, sharding: NamedSharding) -> QuantizedColumns:
        """Rounded where it lies."""
        return _laid(self.logical.from_array(array, sharding))


_laid = jax.jit(lay_columns)
