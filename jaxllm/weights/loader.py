"""Checkpoint -> sharded decoder parameters, one at a time.

The abstract decoder says which parameters exist, with shapes and dims; the family says of which parts of which
checkpoint tensors each is made. Missing, unexpected or misshapen tensors are refused by name before anything is
read, and every device's shard is read straight from the slices that it is made of.
"""

from __future__ import annotations

import functools
import math
import zlib
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
from jaxllm.families.tensor_names import named
from jaxllm.models.decoder import Decoder
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides, kv_copies, vocab_padding
from jaxllm.weights.stored import Storage, aligned_zeros, choose_storage

_THREADS = 2  # parameters read at the same time; more only adds to the peak of memory
_PIECE_ELEMENTS = 1 << 20  # of a tensor handled at a time: what is read fits the processor's cache


@dataclass(frozen=True)
class AbstractModel:
    """The decoder without values: graph and parameter variables as shapes, both fixed by config and placement."""

    cfg: ModelConfig
    graph: Any
    state: Any
    placement: Placement
    kv_copies: int
    vocab_padding: int
    is_packed: bool = False

    @functools.cached_property
    def parameters(self) -> Any:
        """The state as it is kept: arrays or stored matrices, as shapes with shardings."""

        def kept(path: Any, variable: Any) -> Any:
            return variable.replace(self.storage(variable).abstract(variable.get_value(), shardings[path].get_value()))

        shardings = dict(nnx.to_flat_state(self.shardings()))
        return nnx.map_state(kept, self.state)

    def storage(self, variable: Any) -> Storage:
        """How a parameter is kept."""
        contracted = variable.get_metadata("contracted")
        return choose_storage(variable.get_value(), contracted, self.placement, use_panels=self.is_packed)

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
        """Bytes that the parameters will take on each device, as they are kept."""
        leaves = jax.tree.leaves(self.parameters)
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def abstract_model(
    cfg: ModelConfig, placement: Placement, dtype: jnp.dtype, *, canonical: bool = False, is_packed: bool = False
) -> AbstractModel:
    """Shapes of the decoder for this mesh: key/value heads repeated and vocabulary padded where the cut asks for it.

    `canonical` leaves both out: the shapes that do not depend on the mesh. `is_packed` (one CPU alone) keeps matrices
    in panels, see `jaxllm.weights.stored`; the shapes in `state` stay those of the matrices.
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
    checkpoint = named(checkpoint)
    family = family_of(checkpoint.config)
    sources = family.weight_map(model.cfg, model.kv_copies)
    _check_tensors(sources, checkpoint, family)
    shardings = dict(nnx.to_flat_state(model.shardings()))

    def load(item: Any) -> Any:
        path, variable = item
        want = variable.get_value()
        read = functools.partial(_read_box, sources[path], dtype=want.dtype, checkpoint=checkpoint)
        return path, variable.replace(model.storage(variable).from_pieces(want, shardings[path].get_value(), read))

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
        return variable.replace(model.storage(variable).from_array(array, sharding))

    return nnx.map_state(make, model.state)


def _random(shape: tuple[int, ...], dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Matrices small enough that activations stay finite through any depth; vectors (norms, biases) near 1."""
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.bfloat16) * 0.02).astype(dtype)


def _check_tensors(sources: WeightMap, checkpoint: Checkpoint, family: Family) -> None:
    expected = dict(checkpoint_tensors(sources))
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            reason = (
                "a model without a head embeds but does not generate"
                if name == "lm_head.weight"
                else (f"it is incomplete or not of family {family.name}")
            )
            raise ValueError(f"the checkpoint has no tensor {name}; {reason}")
        if tuple(info.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(info.shape)}; the configuration says {shape}")
        if not info.dtype.startswith(("float", "bfloat")) or info.dtype.startswith("float8"):
            raise ValueError(f"tensor {name} has dtype {info.dtype}; expected float32, float16 or bfloat16")
    for name in checkpoint.tensors:
        if name not in expected and not family.ignores(name):
            raise ValueError(f"the checkpoint has an unexpected tensor {name} that family {family.name} would not use")


def _read_box(source: Source, box: Box, dtype: jnp.dtype, checkpoint: Checkpoint) -> np.ndarray:
    """A box of a parameter. Each piece's pages are let go of at once: the file never counts as memory."""
    out = aligned_zeros([part.stop - part.start for part in box], dtype)  # padding rows come from no tensor: zeros
    for name, target, value in source.pieces(box, checkpoint.read, _PIECE_ELEMENTS):
        out[target] = value if value.flags.c_contiguous else _transposed(value)
        checkpoint.release(name)
    return out


def _transposed(value: np.ndarray) -> np.ndarray:
    """A contiguous copy. The runtime's transpose works in tiles and is many times faster than NumPy's."""
    return np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))
