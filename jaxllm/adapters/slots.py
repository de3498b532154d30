"""The arrays of the slots that adapters lie in, and one adapter's arrays as the host gives them.

Targets, a number of slots and their rank -> shapes with shardings. All static: an adapter that comes is data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxllm.adapters.panels import LowRankPanels, takes_panels
from jaxllm.adapters.product import LowRank, Slots
from jaxllm.adapters.targets import Target
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides


def stacked_slots(targets: Mapping[str, Target], placement: Placement, num_slots: int, rank: int) -> dict[str, Slots]:
    """The matrices of all slots, cut as the activations that they multiply; refuses sizes that do not divide."""

    def struct(target: Target, shape: tuple[int, ...], dims: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        sharding = placement.sharding(*dims)
        names = tuple(dim or "rank" for dim in dims)
        check_divides(target.name, (num_slots, *shape), names, tuple(sharding.spec), placement.sizes)
        return jax.ShapeDtypeStruct((num_slots, *shape), target.dtype, sharding=sharding)

    found: dict[str, Slots] = {}
    for name, target in targets.items():
        if takes_panels(target, rank):
            found[name] = LowRankPanels.abstract(target, num_slots, rank, placement.replicated)
            continue
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
    arrays: Mapping[str, Slots], theirs: Mapping[str, Target], ours: Mapping[str, Target]
) -> dict[str, Slots]:
    """One adapter's arrays, as the host gives them, for the same model on another mesh (with other copies of heads)."""
    found: dict[str, Slots] = {}
    for name, target in ours.items():
        given, source = arrays[name], theirs[name]
        if target.shapes(1) == source.shapes(1) and target.in_panels == source.in_panels:
            found[name] = given
            continue
        a, b = given.plain(source) if isinstance(given, LowRankPanels) else (given.a, given.b)
        modules = source.to_modules(a, b)
        found[name] = LowRank.of(target, *target.from_modules(modules, b.shape[0], target.dtype))
    return as_in_slots(ours, found)


def as_in_slots(targets: Mapping[str, Target], adapter: Mapping[str, Slots]) -> dict[str, Slots]:
    """One adapter's arrays as the slots keep them."""

    def kept(target: Target, m: Slots) -> Slots:
        if isinstance(m, LowRankPanels) or not takes_panels(target, m.b.shape[0]):
            return m
        return LowRankPanels.of(target, m.a, m.b)

    return {name: kept(targets[name], m) for name, m in adapter.items()}


def no_adapter(targets: Mapping[str, Target], rank: int) -> dict[str, Slots]:
    """An adapter that changes nothing, as the host gives it."""
    zeros = {
        name: LowRank.of(target, *(np.zeros(shape, target.dtype) for shape in target.shapes(rank)))
        for name, target in targets.items()
    }
    return as_in_slots(targets, zeros)
