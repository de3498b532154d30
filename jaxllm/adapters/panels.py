"""Adapters in their slots as the CPU's own kernel reads them (see `jaxllm.ops.cpu.low_rank`).

Targets and matrices as `product` has them -> the same in panels, and their products. For one CPU device and bfloat16;
everywhere else slots keep `LowRank`.

Dimension letters: S slots of adapters, P modules of a parameter, R rank, K inputs, B panels of columns, C their width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.adapters.targets import Target
from jaxllm.models.primitives import contract
from jaxllm.ops.contraction import num_contracted
from jaxllm.ops.cpu import low_rank
from jaxllm.ops.cpu.low_rank import RowsBySlot
from jaxllm.ops.cpu.packed import PANEL, PackedMatrix


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class LowRankPanels:
    """The matrices of one parameter: of every slot, or of one adapter without the dim S.

    Attributes:
        a: bfloat16 `[S, P*R/4, K/32, 4, 32]`, see `low_rank.pack_a`.
        b: uint32 `[B, S, R/2, C]`.
        module_of: for each panel, the number of its module.
    """

    a: Any
    b: Any
    module_of: tuple[int, ...] = field(metadata={"static": True})

    @classmethod
    def of(cls, target: Target, a: np.ndarray, b: np.ndarray) -> LowRankPanels:
        """One adapter's, of `a` and `b` as the target says."""
        modules, rank = a.shape[:2]
        b_RN = np.ascontiguousarray(b.reshape(rank, -1))
        a_PRK = a.reshape(modules, rank, -1)
        return cls(low_rank.pack_a(a_PRK), low_rank.pack_b(b_RN), modules_of_panels(target))

    @classmethod
    def abstract(cls, target: Target, num_slots: int, rank: int, sharding: jax.sharding.Sharding) -> LowRankPanels:
        """Those of all slots, as shapes."""
        inputs, outputs = sizes(target)
        block = low_rank.block_of(rank)
        blocks = (num_slots, len(target.modules) * rank // block, inputs // low_rank.LANES, block, low_rank.LANES)
        a = jax.ShapeDtypeStruct(blocks, target.dtype, sharding=sharding)
        shape = (outputs // PANEL, num_slots, rank // 2, PANEL)
        return cls(a, jax.ShapeDtypeStruct(shape, np.uint32, sharding=sharding), modules_of_panels(target))

    def plain(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """The reverse of `of`: an adapter's matrices as the target says."""
        rank = 2 * self.b.shape[1]
        a, b = target.shapes(rank)
        return low_rank.unpack_a(self.a, rank).reshape(a), low_rank.unpack_b(self.b).reshape(b)

    def with_slot(self, slot: jax.Array, one: LowRankPanels) -> LowRankPanels:
        """Another adapter in a slot."""
        return dataclasses.replace(self, a=self.a.at[slot].set(one.a), b=self.b.at[:, slot].set(one.b))

    def product(self, spec: str, x: jax.Array, weight: nnx.Param, rows: RowsBySlot) -> jax.Array:
        """The product with the parameter, every row's adapter added."""
        matrix, first = weight.get_value(), x.ndim - num_contracted(spec)
        x_TK = x.reshape(-1, math.prod(x.shape[first:]))
        if isinstance(matrix, PackedMatrix):
            y_TN = low_rank.product_and_low_rank(x_TK, matrix.panels, self.a, self.b, rows, self.module_of)
            return y_TN.reshape(*x.shape[:first], *matrix.remaining)
        y = contract(spec, x, weight)
        y_TN = y.reshape(x_TK.shape[0], -1)
        return low_rank.add_low_rank(y_TN, x_TK, self.a, self.b, rows, self.module_of).reshape(y.shape)


def takes_panels(target: Target, rank: int) -> bool:
    """Whether a target's slots can be kept in panels: each of them is of one module."""
    if not target.in_panels or not low_rank.takes(*sizes(target), rank, target.dtype):
        return False
    return all(len(set(panel)) == 1 for panel in _modules(target).reshape(-1, PANEL).tolist())


def modules_of_panels(target: Target) -> tuple[int, ...]:
    """For each panel of a target's outputs, the number of its module."""
    return tuple(_modules(target)[::PANEL].tolist())


def sizes(target: Target) -> tuple[int, int]:
    """Inputs and outputs of a target."""
    inputs, outputs = (math.prod(target.shape[i] for i in dims) for dims in (target.contracted, target.kept))
    return inputs, outputs


def _modules(target: Target) -> np.ndarray:
    """For each output, the number of its module."""
    shape = [target.shape[i] for i in target.kept]
    if target.stacked is None:
        return np.zeros(math.prod(shape), int)
    along = [1] * len(shape)
    along[target.stacked] = -1
    return np.broadcast_to(np.array(target.module_of).reshape(along), shape).reshape(-1)
