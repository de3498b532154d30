"""Checkpoint -> sharded decoder parameters, one at a time.

The abstract decoder says which parameters exist, with shapes and dims; the family says of which parts of which
checkpoint tensors each is made. Missing, unexpected or misshapen tensors are refused by name before anything is
read, and every device's shard is read straight from the slices that it is made of.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.checkpoints import Checkpoint
from jaxllm.config import ModelConfig
from jaxllm.families.registry import Family, family_of
from jaxllm.families.sources import Box, Source, WeightMap, checkpoint_tensors
from jaxllm.models.decoder import Decoder
from jaxllm.ops.cpu.packed import abstract_panels, pack, packs
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides, kv_copies, vocab_padding

_THREADS = 2  # parameters read at the same time; more only adds to the peak of memory
_PIECE_ELEMENTS = 1 << 20  # of a tensor handled at a time: what is read fits the processor's cache
_ALIGNMENT = 64  # bytes; what the CPU backend needs to take a host array over without a copy


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """The decoder without values: graph and parameter variables as shapes, both fixed by config and placement."""

    cfg: ModelConfig
    graph: Any
    state: Any
    placement: Placement
    kv_copies: int
    vocab_padding: int
    is_packed: bool = False

    def packs(self, variable: Any) -> bool:
        """Whether this parameter is kept in panels."""
        want = variable.get_value()
        return self.is_packed and packs(want.shape, want.dtype, variable.get_metadata("contracted"))

    def packed_dims(self) -> tuple[tuple[int, ...] | None, ...]:
        """For every parameter in order: the dims that products keep where it is in panels, else None."""

        def kept(variable: Any) -> tuple[int, ...] | None:
            contracted = variable.get_metadata("contracted")
            shape = variable.get_value().shape
            return tuple(n for i, n in enumerate(shape) if i not in contracted) if self.packs(variable) else None

        return tuple(kept(variable) for _, variable in nnx.to_flat_state(self.state))

    def abstract_parameters(self) -> list[jax.ShapeDtypeStruct]:
        """Every parameter as it is kept: shape, dtype and sharding, in order."""

        def shaped(variable: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            want, place = variable.get_value(), sharding.get_value()
            if self.packs(variable):
                want, place = abstract_panels(want, variable.get_metadata("contracted")), self.placement.replicated
            return jax.ShapeDtypeStruct(want.shape, want.dtype, sharding=place)

        flat = zip(nnx.to_flat_state(self.state), nnx.to_flat_state(self.shardings()), strict=True)
        return [shaped(variable, sharding) for (_, variable), (_, sharding) in flat]

    def packed(self, variable: Any, array: jax.Array) -> jax.Array:
        """A parameter's value as it is kept."""
        if not self.packs(variable):
            return array
        contracted = variable.get_metadata("contracted")
        want = abstract_panels(variable.get_value(), contracted)
        panels = pack(np.asarray(array), contracted, _aligned(want.shape, want.dtype))
        return jax.device_put(panels, self.placement.replicated, may_alias=True)

    def shardings(self) -> Any:
        """NamedShardings in the shape of the state; refuses sizes that do not divide."""

        def place(path: Any, variable: Any) -> Any:
            dims, shape = variable.get_metadata("dims"), variable.get_value().shape
            sharding = self.placement.sharding(*dims, parameter=True)
            name = ".".join(map(str, path))
            check_divides(name, shape, dims, tuple(sharding.spec), self.placement.sizes)
            return variable.replace(sharding)

        return nnx.map_state(place, self.state)

    def parameter_bytes_per_device(self) -> int:
        """Bytes that the parameters will take on each device."""
        shardings = dict(nnx.to_flat_state(self.shardings()))
        total = 0
        for path, variable in nnx.to_flat_state(self.state):
            value = variable.get_value()
            total += math.prod(shardings[path].get_value().shard_shape(value.shape)) * value.dtype.itemsize
        return total


def abstract_model(
    cfg: ModelConfig, placement: Placement, dtype: jnp.dtype, *, canonical: bool = False, is_packed: bool = False
) -> AbstractModel:
    """Shapes of the decoder for this mesh: key/value heads repeated and vocabulary padded where the cut asks for it.

    `canonical` leaves both out: the shapes that do not depend on the mesh. `is_packed` (one CPU alone) keeps matrices
    in panels, see `jaxllm.ops.cpu.packed`; the shapes here stay those of the matrices.
    """
    copies = 1 if canonical else kv_copies(cfg, placement.rules, placement.sizes)
    padding = 0 if canonical else vocab_padding(cfg, placement.rules, placement.sizes)
    model = nnx.eval_shape(lambda: Decoder(cfg, kv_copies=copies, vocab_padding=padding, dtype=dtype))
    graph, state = nnx.split(model)
    return AbstractModel(cfg, graph, state, placement, copies, padding, is_packed)


def load_parameters(model: AbstractModel, checkpoint: Checkpoint) -> Any:
    """Read every parameter into its sharding, shard by shard: each process reads only the bytes it owns.

    Raises ValueError naming a tensor that is missing, unexpected or misshapen before any is read.
    """
    family = family_of(checkpoint.config)
    sources = family.weight_map(model.cfg, model.kv_copies)
    _check_tensors(sources, checkpoint, family, model.cfg)
    shardings = dict(nnx.to_flat_state(model.shardings()))

    def load(item: Any) -> Any:
        path, variable = item
        array = _load_array(sources[path], variable.get_value(), shardings[path].get_value(), checkpoint)
        return path, variable.replace(model.packed(variable, array))

    with ThreadPoolExecutor(_THREADS) as pool:
        return nnx.from_flat_state(list(pool.map(load, nnx.to_flat_state(model.state))))


def random_parameters(model: AbstractModel, seed: int = 0) -> Any:
    """Random weights of any configuration, made on the device in their sharding (`load_format="dummy"`)."""
    shardings = dict(nnx.to_flat_state(model.shardings()))
    key = jax.random.key(seed)
    makers: dict[Any, Any] = {}

    def make(path: Any, variable: Any) -> Any:
        want, sharding = variable.get_value(), shardings[path].get_value()
        kind = (want.shape, want.dtype, sharding)
        if kind not in makers:
            makers[kind] = jax.jit(functools.partial(_random, want.shape, want.dtype), out_shardings=sharding)
        array = makers[kind](jax.random.fold_in(key, zlib.crc32(repr(path).encode())))
        return variable.replace(model.packed(variable, array))

    return nnx.map_state(make, model.state)


def _random(shape: tuple[int, ...], dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Matrices small enough that activations stay finite through any depth; vectors (norms, biases) near 1."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(dtype)


def _check_tensors(sources: WeightMap, checkpoint: Checkpoint, family: Family, cfg: ModelConfig) -> None:
    expected = dict(checkpoint_tensors(sources))
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ValueError(f"the checkpoint has no tensor {name}; it is incomplete or not of family {family.name}")
        if tuple(info.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(info.shape)}; the configuration says {shape}")
        if not info.dtype.startswith(("float", "bfloat")) or info.dtype.startswith("float8"):
            raise ValueError(f"tensor {name} has dtype {info.dtype}; expected float32, float16 or bfloat16")
    for name in checkpoint.tensors:
        if name not in expected and not family.ignores(name, cfg):
            raise ValueError(f"the checkpoint has an unexpected tensor {name} that family {family.name} would not use")


def _load_array(source: Source, want: Any, sharding: jax.sharding.NamedSharding, checkpoint: Checkpoint) -> jax.Array:
    """One parameter, shard by shard; a shard that several devices hold is read once."""
    shards: dict[Any, np.ndarray] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(want.shape).items():
        box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), want.shape, strict=True))
        key = tuple((part.start, part.stop) for part in box)
        if key not in shards:
            shards[key] = _read_shard(source, box, want.dtype, checkpoint)
        # On the CPU this host array becomes the device's own where its alignment allows; nobody writes to it again.
        arrays.append(jax.device_put(shards[key], device, may_alias=True))
    return jax.make_array_from_single_device_arrays(want.shape, sharding, arrays)


def _read_shard(source: Source, box: Box, dtype: jnp.dtype, checkpoint: Checkpoint) -> np.ndarray:
    """A box of a parameter. Each piece's pages are let go of at once: the file never counts as memory."""
    shape = [part.stop - part.start for part in box]
    out = _aligned(shape, dtype)  # zeros: rows that pad the vocabulary come from no tensor
    for name, target, value in source.pieces(box, checkpoint.read, _PIECE_ELEMENTS):
        out[target] = value if value.flags.c_contiguous else _transposed(value)
        checkpoint.release(name)
    return out


def _aligned(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """Zeros that the CPU backend takes over without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    return buffer[first : first + num_bytes].view(dtype).reshape(shape)


def _transposed(value: np.ndarray) -> np.ndarray:
    """A contiguous copy. The runtime's transpose works in tiles and is many times faster than NumPy's."""
    return np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))
