"""The products of a decoder with adapters: `x W + x A B`, for one adapter or for another one in every row.

`Context.product` is where they come in; B holds the adapter's scale already. Pure functions.

Dimension letters: T tokens, S slots of adapters, P modules of a parameter, R rank; those of a product's spec: X is the
dim along which the modules of a parameter lie.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.adapters.panels import LowRankPanels
from jaxllm.adapters.peft import PeftAdapter
from jaxllm.adapters.targets import Target, place
from jaxllm.models.primitives import Product, contract
from jaxllm.ops.contraction import contraction
from jaxllm.ops.cpu.low_rank import RowsBySlot


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LowRank:
    """The matrices of one parameter (see `Target`): of one adapter, or of every slot with a leading dim S.

    Attributes:
        a: `[P, R, *dims that products sum over]`.
        b: `[R, *dims that they keep]`.
        stacked: which kept dim the modules lie along; None where there is one module.
        module_of: for each index of it, the number of its module.
    """

    a: Any
    b: Any
    stacked: int | None = field(default=None, metadata={"static": True})
    module_of: tuple[int, ...] = field(default=(), metadata={"static": True})

    @classmethod
    def of(cls, target: Target, a: Any, b: Any) -> LowRank:
        """The matrices of a target."""
        return cls(a, b, target.stacked, target.module_of)

    def with_slot(self, slot: jax.Array, one: LowRank) -> LowRank:
        """Another adapter in a slot."""
        return dataclasses.replace(self, a=self.a.at[slot].set(one.a), b=self.b.at[slot].set(one.b))


Slots = LowRank | LowRankPanels  # the matrices of one parameter, of every slot


def adapted_product(adapter: Mapping[str, LowRank], scale: float = 1.0) -> Product:
    """One adapter for every token: for training, and derivable in its matrices and in x.

    Args:
        adapter: by the names of products; parameters that are not named are left alone.
        scale: what its products are multiplied by.
    """

    def product(name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
        y = contract(spec, x, weight)
        if (matrices := adapter.get(name)) is None:
            return y
        return y + scale * _low_rank(spec, x, matrices)

    return product


def slotted_product(slots: Mapping[str, Slots], slot_T: jax.Array) -> Product:
    """Another adapter in every row: slot 0 stands for none, slot `s` for the matrices at `s - 1`."""
    num_slots = next((m.a.shape[0] for m in slots.values() if isinstance(m, LowRankPanels)), None)
    rows = None if num_slots is None else RowsBySlot.of(slot_T, num_slots)

    def product(name: str, spec: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
        if (matrices := slots.get(name)) is None:
            return contract(spec, x, weight)
        if isinstance(matrices, LowRankPanels):
            assert rows is not None, name
            return matrices.product(spec, x, weight, rows)
        return contract(spec, x, weight) + _of_slots(spec, x, matrices, slot_T)

    return product


def adapter_arrays(targets: Mapping[str, Target], adapter: PeftAdapter, rank: int) -> dict[str, LowRank]:
    """An adapter's matrices for every target, in its dtype, with the scale in B; zeros fill up to `rank`.

    Raises:
        ValueError: a module or a shape that does not fit the model, or a larger rank, by name.
    """
    if adapter.rank > rank:
        raise ValueError(f"the adapter has rank {adapter.rank}; at most {rank} are served: raise max_lora_rank")
    sizes = {name: (m.a.shape[0], m.a.shape[1], m.b.shape[0]) for name, m in adapter.modules.items()}
    names = place(targets, sizes)
    modules = {}
    for theirs, ours in names.items():
        m = adapter.modules[theirs]
        modules[ours] = (m.a.astype(np.float32), m.b.astype(np.float32) * np.float32(m.scale))
    return {
        name: LowRank.of(target, *target.from_modules(modules, rank, target.dtype)) for name, target in targets.items()
    }


@functools.cache
def _dims(spec: str) -> tuple[str, str, str]:
    """The dims of a product that are summed over, that come from x alone, and that come from the matrix."""
    given, y = spec.split("->")
    x, w = given.split(",")
    inputs = "".join(d for d in w if d not in y)
    return inputs, "".join(d for d in x if d not in inputs), "".join(d for d in w if d in y)


def _low_rank(spec: str, x: jax.Array, m: LowRank) -> jax.Array:
    inputs, rows, kept = _dims(spec)
    x = x.astype(m.a.dtype)
    h = contraction(f"{rows}{inputs},pr{inputs}->{rows}pr", x, m.a).astype(m.b.dtype)
    if m.stacked is None:
        return contraction(f"{rows}r,r{kept}->{rows}{kept}", h[..., 0, :], m.b)
    stack = kept[m.stacked]
    h = jnp.take(h, jnp.array(m.module_of), axis=-2)
    return contraction(f"{rows}{stack}r,r{kept}->{rows}{kept}", h, m.b)


def _of_slots(spec: str, x: jax.Array, m: LowRank, slot_T: jax.Array) -> jax.Array:
    """Every row times the A of every slot, what is not its own set to zero, times the B of all slots at once.

    One product of width S * R each, whatever slots the rows have: few matrix tiles on an accelerator.
    """
    inputs, rows, kept = _dims(spec)
    h = contraction(f"{rows}{inputs},spr{inputs}->{rows}psr", x.astype(m.a.dtype), m.a)
    own_TS = slot_T[:, None] == jnp.arange(1, m.a.shape[0] + 1)
    h = jnp.where(own_TS[:, None, :, None], h, 0).astype(m.b.dtype)
    if m.stacked is None:
        return contraction(f"{rows}sr,sr{kept}->{rows}{kept}", h[:, 0], m.b)
    stack = kept[m.stacked]
    h = jnp.take(h, jnp.array(m.module_of), axis=1)
    return contraction(f"{rows}{stack}sr,sr{kept}->{rows}{kept}", h, m.b)
