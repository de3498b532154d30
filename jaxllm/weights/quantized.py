"""Keeping a parameter as a quantised matrix (`jaxllm.ops.quantized`), read shard by shard.

Dimension letters: K inputs, J groups of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.config.quantization import Scheme
from jaxllm.ops.quantized import QuantizedMatrix, leaf_specs
from jaxllm.weights.rounding import Pieces, round_to_nearest

Box = tuple[slice, ...]
ReadPieces = Callable[[Box], Pieces]
_NAMES = ("codes", "scales", "minima", "order", "input_scale")


@dataclass(frozen=True, slots=True)
class Quantized:
    """See `jaxllm.weights.stored.Storage`; `from_pieces` takes a function that reads `Pieces` of boxes.

    Attributes:
        scheme: how numbers are kept.
        inputs: the dims of the parameter that are inputs of its linear: neighbours.
    """

    scheme: Scheme
    inputs: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The dim of the codes that is all inputs."""
        return self.inputs[0]

    def merged(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`[.., K, ..]`: a parameter's shape with its inputs in one dim."""
        first, end = self.inputs[0], self.inputs[-1] + 1
        return (*shape[:first], math.prod(shape[first:end]), *shape[end:])

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`[.., J, ..]` of a parameter's shape."""
        lead, size, kept = self._cut(self.merged(shape))
        return (*lead, size // self.scheme.group if self.scheme.group else 1, *kept)

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding) -> QuantizedMatrix:
        """See `Storage`."""
        shapes, dtypes = self._shapes(want.shape), self._dtypes()
        structs = [
            None if shape is None else jax.ShapeDtypeStruct(shape, dtype, sharding=place)
            for shape, dtype, place in zip(shapes, dtypes, self._placed(want, sharding), strict=True)
        ]
        return self._matrix(want, sharding, structs)

    def from_pieces(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding, read: ReadPieces) -> QuantizedMatrix:
        """Shard by shard: each process reads only what it owns, and a shard of several devices once."""
        indices = sharding.addressable_devices_indices_map(want.shape)
        found: dict[Any, list[np.ndarray | None]] = {}
        shards: list[list[jax.Array]] = [[] for _ in _NAMES]
        for device, index in indices.items():
            box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), want.shape, strict=True))
            key = tuple((part.start, part.stop) for part in box)
            if key not in found:
                found[key] = self._shard(want, box, read)
            for arrays, array in zip(shards, found[key], strict=True):
                if array is not None:
                    arrays.append(jax.device_put(array, device, may_alias=True))
        places = self._placed(want, sharding)
        leaves = [
            None if shape is None or place is None else jax.make_array_from_single_device_arrays(shape, place, arrays)
            for shape, place, arrays in zip(self._shapes(want.shape), places, shards, strict=True)
        ]
        return self._matrix(want, sharding, leaves)

    def from_array(self, array: jax.Array, sharding: NamedSharding) -> QuantizedMatrix:
        """Rounded where it lies."""
        struct = jax.ShapeDtypeStruct(array.shape, array.dtype)
        places = self._placed(struct, sharding)
        if self.scheme.has_minima or self.scheme.table or self.scheme.is_permuted:
            raise ValueError(f"numbers cannot be rounded to {self.scheme.name}; use int8, int4 or fp8")

        def rounded(array: jax.Array) -> list[jax.Array]:
            pieces = round_to_nearest(array.reshape(self.merged(array.shape)), self.scheme, self.axis)
            return [self._packed(pieces.codes, jnp), pieces.scales.astype(self.scheme.scale_dtype)]

        codes, scales = jax.jit(rounded, out_shardings=places[:2])(array)
        return self._matrix(struct, sharding, [codes, scales, None, None, None])

    def _shard(self, want: jax.ShapeDtypeStruct, box: Box, read: ReadPieces) -> list[np.ndarray | None]:
        """A device's codes, scales and so on. A scale of all inputs needs all of them, whatever is kept."""
        first, end = self.inputs[0], self.inputs[-1] + 1
        if self.scheme.group:
            pieces, cut = read(box), slice(None)
        else:
            whole = tuple(slice(0, n) for n in want.shape[first:end])
            pieces = read((*box[:first], *whole, *box[end:]))
            inner = math.prod(want.shape[first + 1 : end])
            cut = slice(box[first].start * inner, box[first].stop * inner)
        codes = self._packed(pieces.codes[(slice(None),) * self.axis + (cut,)], np)
        values = [codes, pieces.scales, pieces.minima, pieces.order, pieces.input_scale]
        return [
            None if shape is None else _contiguous(value, dtype)
            for value, shape, dtype in zip(values, self._shapes(want.shape), self._dtypes(), strict=True)
        ]

    def _packed(self, codes: Any, xp: Any) -> Any:
        """Two 4-bit codes in a byte, the first in its low half."""
        if self.scheme.bits != 4:
            return codes
        every = (slice(None),) * self.axis
        low, high = codes[(*every, slice(0, None, 2))], codes[(*every, slice(1, None, 2))]
        return (low | (high << xp.uint8(4))).astype(xp.uint8)

    def _matrix(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding, leaves: Sequence[Any]) -> QuantizedMatrix:
        inner = tuple(want.shape[i] for i in self.inputs[1:])
        parts = _parts(sharding, self.inputs)
        named: dict[str, Any] = dict(zip(_NAMES, leaves, strict=True))
        return QuantizedMatrix(
            **named,
            scheme=self.scheme,
            axis=self.axis,
            inner=inner,
            parts=parts,
            dtype=jnp.dtype(want.dtype).name,
        )

    def _shapes(self, shape: Sequence[int]) -> list[tuple[int, ...] | None]:
        lead, size, kept = self._cut(self.merged(shape))
        scales, s = self.scale_shape(shape), self.scheme
        is_static = s.activations is not None and s.activations.is_static
        return [
            (*lead, size // 2 if s.bits == 4 else size, *kept),
            scales,
            scales if s.has_minima else None,
            (*lead, size) if s.is_permuted else None,
            () if is_static else None,
        ]

    def _dtypes(self) -> list[np.dtype]:
        kinds = {"uint4": np.uint8, "int8": np.int8, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
        scale = jnp.dtype(self.scheme.scale_dtype)
        return [np.dtype(kinds[self.scheme.codes]), scale, scale, np.dtype(np.int32), np.dtype(np.float32)]

    def _placed(self, want: jax.ShapeDtypeStruct, sharding: NamedSharding) -> list[NamedSharding | None]:
        ranks = [s if s is None else jax.ShapeDtypeStruct(s, np.bool_) for s in self._shapes(want.shape)]
        inner = tuple(want.shape[i] for i in self.inputs[1:])
        named: dict[str, Any] = dict(zip(_NAMES, ranks, strict=True))
        like = QuantizedMatrix(**named, scheme=self.scheme, axis=self.axis, inner=inner)
        specs = leaf_specs(like, sharding.spec)
        return [
            None if (spec := getattr(specs, name)) is None else NamedSharding(sharding.mesh, spec) for name in _NAMES
        ]

    def _cut(self, merged: Sequence[int]) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        return tuple(merged[: self.axis]), merged[self.axis], tuple(merged[self.axis + 1 :])


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A quantised matrix in an order that a kernel wants; `from_pieces` takes what reads `Pieces` of boxes.

    Attributes:
        logical: how numbers are kept, and along which dims.
    """

    logical: Quantized

    @property
    def scheme(self) -> Scheme:
        """How numbers are kept."""
        return self.logical.scheme

    @property
    def axis(self) -> int:
        """The dim of the codes that is all inputs."""
        return self.logical.axis

    def merged(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Quantized.merged`."""
        return self.logical.merged(shape)


def _parts(sharding: NamedSharding, inputs: tuple[int, ...]) -> int:
    """Into how many parts the mesh cuts the inputs."""
    spec = (*sharding.spec, *(None,) * 8)
    axes = next((spec[i] for i in inputs if spec[i]), ())
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def _contiguous(value: Any, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(value, dtype) if np.ndim(value) else np.asarray(value, dtype)
