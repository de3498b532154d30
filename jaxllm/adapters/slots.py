"""The arrays of the slots that adapters lie in, and one adapter's arrays as the host gives them.

Targets, a number of slots and their rank -> shapes with shardings. All static: an adapter that comes is data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxllm.adapters.product import LowRank
from jaxllm.adapters.targets import Target
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides


def stacked_slots(targets: Mapping[str, Target], placement: Placement, num_slots: int, rank: int) -> dict[str, LowRank]:
    """The matrices of all slots, cut as the activations that they multiply; refuses sizes that do not divide."""

    def struct(target: Target, shape: tuple[int, ...], dims: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = placement.sharding(*dims)
        names = tuple(dim or "rank" for dim in dims)
        check_divides(target.name, (num_slots, *shape), names, tuple(sharding.spec), placement.sizes)
        return jax.ShapeDtypeStruct((num_slots, *shape), target.dtype, sharding=sharding)

    found = {}
    for name, target in targets.items():
        a, b = target.shapes(rank)
        inputs, kept = (tuple(target.dims[i] for i in dims) for dims in (target.contracted, target.kept))
        found[name] = LowRank.of(
            target, struct(target, a, (None, None, None, *inputs)), struct(target, b, (None, None, *kept))
        )
    return found


def slot_bytes(targets: Mapping[str, Target], placement: Placement, num_slots: int, rank: int) -> int:
    """Bytes that the slots take on each device."""
    leaves = jax.tree.leaves(stacked_slots(targets, placement, num_slots, rank))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def laid_anew(
    arrays: Mapping[str, LowRank], theirs: Mapping[str, Target], ours: Mapping[str, Target]
) -> dict[str, LowRank]:
    """One adapter's arrays, as the host gives them, for the same model on another mesh (with other copies of heads)."""
    found = {}
    for name, target in ours.items():
        given = arrays[name]
        if target.shapes(1) == theirs[name].shapes(1):
            found[name] = given
            continue
        modules = theirs[name].to_modules(given.a, given.b)
        found[name] = LowRank.of(target, *target.from_modules(modules, given.b.shape[0], target.dtype))
    return found


def no_adapter(targets: Mapping[str, Target], rank: int) -> dict[str, LowRank]:
    """An adapter that changes nothing, as the host gives it."""
    return {
        name: LowRank.of(target, *(np.zeros(shape, target.dtype) for shape in target.shapes(rank)))
        for name, target in targets.items()
    }
