"""Keeping a quantised matrix of one CPU in panels (`jaxllm.ops.cpu.quantized`), made while its pieces are read.

Dimension letters: E experts (or none), K inputs, N columns, W words of a column, C columns of a panel, J groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.ops.cpu.quantized import PANEL, QuantizedPanels, Rounding, pack_codes, pack_scales, packs_quantized, rounds
from jaxllm.ops.cpu.quantized_numbers import Codes
from jaxllm.weights.boxes import Box, panel_boxes
from jaxllm.weights.memory import lasting_zeros
from jaxllm.weights.quantized import LaidOut
from jaxllm.weights.rounding import Pieces, round_to_nearest

Parts = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class QuantizedInPanels(LaidOut):
    """In panels; see `LaidOut`."""

    @property
    def meaning(self) -> Codes:
        """Of codes."""
        s = self.scheme
        return Codes(8) if s.bits == 8 else Codes(4, s.table or tuple(float(code - s.offset) for code in range(16)))

    def fits(self, want: jax.ShapeDtypeStruct, contracted: tuple[int, ...]) -> bool:
        """Whether the kernels know such codes, and multiply such a parameter over its inputs and never otherwise."""
        s = self.scheme
        if s.codes not in ("uint4", "int8") or (s.bits == 8 and s.offset):
            return False
        if (a := s.activations) is not None and (a.codes != "int8" or a.is_static or not rounds(self.meaning)):
            return False
        if not (contracted == self.logical.inputs or (self._are_experts(want.shape) and not contracted)):
            return False
        _, k, n = self._sizes(want.shape)
        return packs_quantized(k, n, s.group or k, self.meaning)

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding) -> QuantizedPanels:
        """See `Storage`."""
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        kinds = self._kinds(want.shape)
        return self._matrix(want, {name: jax.ShapeDtypeStruct(*kind, sharding=whole) for name, kind in kinds.items()})

    def from_pieces(
        self, want: jax.ShapeDtypeStruct, sharding: NamedSharding, read: Callable[[Box], Pieces]
    ) -> QuantizedPanels:
        """Some panels at a time, so that the codes never exist whole beside them."""
        arrays = {name: lasting_zeros(*kind) for name, kind in self._kinds(want.shape).items()}
        for parts, boxes in self._matrices(want, arrays):
            first = 0
            for box in boxes:
                first = self._pack(read(box), parts, first, is_table=self._is_table(want.shape))
            assert first == len(parts["codes"]), (first, parts["codes"].shape)
        return self._placed(want, arrays, sharding)

    def from_array(self, array: jax.Array, sharding: NamedSharding) -> QuantizedPanels:
        """Rounded where it lies."""
        s, axis, num = self.scheme, self.axis, len(self.logical.inputs)
        if s.has_minima or s.table or s.is_permuted:
            raise ValueError(f"numbers cannot be rounded to {s.name}; use int8, int4 or fp8")
        merged = self.merged(array.shape)

        @jax.jit
        def rounded(array: jax.Array) -> list[jax.Array]:
            pieces = round_to_nearest(array.reshape(merged), s, axis)
            return [pieces.codes, pieces.scales]

        codes, scales = map(np.asarray, rounded(array))

        def read(box: Box) -> Pieces:
            box = (*box[:axis], slice(None), *box[axis + num :])
            return Pieces(codes[box], scales[box])

        return self.from_pieces(jax.ShapeDtypeStruct(array.shape, array.dtype), sharding, read)

    def _are_experts(self, shape: Sequence[int]) -> bool:
        return self.logical.inputs == (1,) and len(shape) > 2

    def _is_table(self, shape: Sequence[int]) -> bool:
        """Whether inputs come last."""
        return self.axis > 0 and not self._are_experts(shape)

    def _sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """E, K and N."""
        lead = tuple(shape[:1]) if self._are_experts(shape) else ()
        k = math.prod(shape[i] for i in self.logical.inputs)
        return lead, k, math.prod(shape) // (k * math.prod(lead))

    def _kinds(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of the arrays that there are."""
        (lead, k, n), s = self._sizes(shape), self.scheme
        scales = (*lead, n // PANEL, k // (s.group or k), PANEL), jnp.dtype(s.scale_dtype)
        kinds = {"codes": ((*lead, n // PANEL, k // self.meaning.per_word, PANEL), np.dtype(np.uint32))}
        kinds |= {"scales": scales} | ({"minima": scales} if s.has_minima else {})
        return kinds | ({"order": ((*lead, k), np.dtype(np.int32))} if s.is_permuted else {})

    def _matrices(self, want: jax.ShapeDtypeStruct, arrays: Parts) -> Iterator[tuple[Parts, Iterator[Box]]]:
        """Of each matrix, where it goes and boxes that are whole panels of it."""
        inputs = self.logical.inputs
        if not self._are_experts(want.shape):
            yield arrays, panel_boxes(want, inputs)
            return
        one = jax.ShapeDtypeStruct(want.shape[1:], want.dtype)
        for expert in range(want.shape[0]):
            boxes = ((slice(expert, expert + 1), *box) for box in panel_boxes(one, (0,)))
            yield {name: array[expert] for name, array in arrays.items()}, boxes

    def _pack(self, pieces: Pieces, parts: Parts, first: int, *, is_table: bool) -> int:
        """Pieces into their places, from panel `first` on; the next panel."""
        axis = int(is_table)

        def flat(array: Any) -> np.ndarray:
            array = np.asarray(array)
            size = array.shape[self.axis]
            return np.ascontiguousarray(array.reshape((-1, size) if is_table else (size, -1)))

        codes = pack_codes(flat(pieces.codes), self.meaning, axis)
        end = first + len(codes)
        parts["codes"][first:end] = codes
        for name in {"scales", "minima"} & parts.keys():
            parts[name][first:end] = pack_scales(flat(getattr(pieces, name)), axis)
        if "order" in parts:
            parts["order"][:] = np.asarray(pieces.order).reshape(-1)
        return end

    def _placed(self, want: jax.ShapeDtypeStruct, arrays: Parts, sharding: NamedSharding) -> QuantizedPanels:
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        return self._matrix(
            want, {name: jax.device_put(array, whole, may_alias=True) for name, array in arrays.items()}
        )

    def _matrix(self, want: jax.ShapeDtypeStruct, leaves: dict[str, Any]) -> QuantizedPanels:
        dropped = {*self.logical.inputs, *((0,) if self._are_experts(want.shape) else ())}
        remaining = tuple(size for i, size in enumerate(want.shape) if i not in dropped)
        return QuantizedPanels(
            leaves["codes"],
            leaves["scales"],
            leaves.get("minima"),
            leaves.get("order"),
            None,
            self.meaning,
            remaining,
            jnp.dtype(want.dtype).name,
            self._rounding(),
        )

    def _rounding(self) -> Rounding:
        a = self.scheme.activations
        return "never" if a is None else "group" if a.by_group else "token"
