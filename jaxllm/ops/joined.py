"""A matrix whose parts are kept in different ways: queries and keys in 4 bits beside values in 6, say.

Products of the parts, side by side.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxllm.ops.contraction import contraction


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class JoinedMatrix:
    """Parts that follow each other along one of the dims that products keep.

    Attributes:
        parts: arrays and stored matrices, alike in all other dims.
        axis: that dim, of the parameter.
    """

    parts: tuple[Any, ...]
    axis: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        first = self.parts[0].shape
        return (*first[: self.axis], sum(part.shape[self.axis] for part in self.parts), *first[self.axis + 1 :])

    def product(self, spec: str, x: jax.Array) -> jax.Array:
        """The contraction of `x` with the matrix that `spec` says, accumulated in float32."""
        terms, out = spec.split("->")
        letter = terms.split(",")[1][self.axis]
        return jnp.concatenate([_multiply(spec, x, part) for part in self.parts], axis=out.index(letter))

    def expert(self, number: jax.Array) -> JoinedMatrix:
        """One of the matrices along the first dim."""
        one = (part[number] if isinstance(part, jax.Array) else part.expert(number) for part in self.parts)
        return JoinedMatrix(tuple(one), self.axis - 1)

    def specs(self, spec: PartitionSpec) -> JoinedMatrix:
        """Where each array lies, given where the parameter would: a pytree like this one."""
        return JoinedMatrix(tuple(p.specs(spec) if hasattr(p, "specs") else spec for p in self.parts), self.axis)


def _multiply(spec: str, x: jax.Array, w: Any) -> jax.Array:
    if not isinstance(w, jax.Array):
        return w.product(spec, x)
    return contraction(spec, x.astype(w.dtype), w)
