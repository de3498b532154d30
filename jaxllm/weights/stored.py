"""How a parameter is kept: as its array, or as a matrix stored in the order that a kernel wants.

The value of an `nnx.Param` is what is kept: an array, or a pytree with `product` and `rows` (see
`jaxllm.models.primitives.StoredMatrix`). A storage says what that looks like from shapes alone, and makes it from
boxes of the parameter as they are read; `choose_storage` is the one place that decides between them.

Dimension letters: K contracted, N kept by the product, B panels, C columns of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxllm.config.quantization import Scheme
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.packed import PackedMatrix, abstract_panels, pack, packs
from jaxllm.weights.boxes import ReadBox, panel_boxes
from jaxllm.weights.joined import Joined
from jaxllm.weights.memory import lasting_zeros
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.quantized_columns import QuantizedInColumns
from jaxllm.weights.quantized_panels import QuantizedInPanels
from jaxllm.weights.schemes import JoinedScheme
from jaxllm.weights.storage import Storage

MatmulBackend = Literal["xla", "llvm", "pallas_gpu"]


@dataclass(frozen=True, slots=True)
class Plain:
    """The array itself, in its sharding."""

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        """See `Storage`."""
        return jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=sharding)

    def from_pieces(self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding, read: ReadBox) -> jax.Array:
        """Shard by shard: each process reads only what it owns, and a shard of several devices once."""
        shards: dict[Any, np.ndarray] = {}
        arrays = []
        for device, index in sharding.addressable_devices_indices_map(want.shape).items():
            box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), want.shape, strict=True))
            key = tuple((part.start, part.stop) for part in box)
            if key not in shards:
                shards[key] = read(box)
            # On the CPU this host array becomes the device's own where its alignment allows; nobody writes to it again.
            arrays.append(jax.device_put(shards[key], device, may_alias=True))
        return jax.make_array_from_single_device_arrays(want.shape, sharding, arrays)

    def from_array(self, array: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
        """See `Storage`."""
        return array


@dataclass(frozen=True, slots=True)
class Panels:
    """A bfloat16 matrix of one CPU device in panels, see `jaxllm.ops.cpu.packed`.

    Attributes:
        contracted: the dims that products sum over, the first ones or the last.
    """

    contracted: tuple[int, ...]

    def abstract(self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> PackedMatrix:
        """See `Storage`."""
        panels = abstract_panels(want, self.contracted)
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        struct = jax.ShapeDtypeStruct(panels.shape, panels.dtype, sharding=whole)
        return PackedMatrix(struct, self._kept(want.shape))  # type: ignore[arg-type]  (a shape in an array's place)

    def from_pieces(
        self, want: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding, read: ReadBox
    ) -> PackedMatrix:
        """Some panels at a time, so that the matrix never exists whole beside them."""
        like = abstract_panels(want, self.contracted)
        panels, first = lasting_zeros(like.shape, like.dtype), 0
        for box in panel_boxes(want, self.contracted):
            matrix = read(box)
            end = first + abstract_panels(matrix, self.contracted).shape[0]
            pack(matrix, self.contracted, panels[first:end])
            first = end
        assert first == len(panels), (first, panels.shape)
        return self._placed(panels, want.shape, sharding)

    def from_array(self, array: jax.Array, sharding: jax.sharding.NamedSharding) -> PackedMatrix:
        """See `Storage`."""
        like = abstract_panels(array, self.contracted)
        panels = pack(np.asarray(array), self.contracted, lasting_zeros(like.shape, like.dtype))
        return self._placed(panels, array.shape, sharding)

    def _placed(self, panels: np.ndarray, shape: Sequence[int], sharding: jax.sharding.NamedSharding) -> PackedMatrix:
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        return PackedMatrix(jax.device_put(panels, whole, may_alias=True), self._kept(shape))

    def _kept(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(shape) if i not in self.contracted)


def choose_storage(
    want: jax.ShapeDtypeStruct,
    contracted: tuple[int, ...],
    *,
    matmul: MatmulBackend,
    scheme: Scheme | JoinedScheme | None = None,
    inputs: tuple[int, ...] = (),
) -> Storage:
    """How a parameter is kept.

    Args:
        want: its shape and dtype.
        contracted: the dims of it that every product sums over, none where that is not so.
        matmul: whose kernels multiply; on several devices XLA's.
        scheme: how it is quantised; None: it is not.
        inputs: the dims of it that are inputs of its linear, along which groups lie.
    """
    if isinstance(scheme, JoinedScheme):
        ends = [*(start for start, _ in scheme.runs[1:]), want.shape[scheme.axis]]
        runs = []
        for (start, one), end in zip(scheme.runs, ends, strict=True):
            shape = (*want.shape[: scheme.axis], end - start, *want.shape[scheme.axis + 1 :])
            part = jax.ShapeDtypeStruct(shape, want.dtype)
            storage = choose_storage(part, contracted, matmul=matmul, scheme=one, inputs=inputs)
            runs.append((start, storage))
        return Joined(scheme.axis, tuple(runs))
    if scheme is not None:
        logical = Quantized(scheme, inputs)
        kinds = {"llvm": QuantizedInPanels, "pallas_gpu": QuantizedInColumns}
        kept = kinds[matmul](logical) if matmul in kinds else None
        return kept if kept is not None and kept.fits(want, contracted) else logical
    if matmul == "llvm" and not ffi.unavailable() and packs(want.shape, want.dtype, contracted):
        return Panels(contracted)
    return Plain()
