"""Checkpoint -> sharded decoder parameters, one at a time.

The abstract decoder says which parameters exist, with shapes and dims; the family says which checkpoint tensors
make each. Missing, unexpected or misshapen tensors are refused by name before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.checkpoints import Checkpoint
from jaxllm.config import ModelConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.families import Family, Path, Source, family_of
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import check_divides, kv_copies, vocab_padding


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """The decoder without values: graph and parameter variables as shapes, both fixed by config and placement."""

    cfg: ModelConfig
    graph: Any
    state: Any
    placement: Placement
    kv_copies: int
    vocab_padding: int

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


def abstract_model(cfg: ModelConfig, placement: Placement, dtype: jnp.dtype) -> AbstractModel:
    """Shapes of the decoder for this mesh: key/value heads repeated and vocabulary padded where the cut asks for it."""
    copies = kv_copies(cfg, placement.rules, placement.sizes)
    padding = vocab_padding(cfg, placement.rules, placement.sizes)
    model = nnx.eval_shape(lambda: Decoder(cfg, kv_copies=copies, vocab_padding=padding, dtype=dtype))
    graph, state = nnx.split(model)
    return AbstractModel(cfg, graph, state, placement, copies, padding)


def load_parameters(model: AbstractModel, checkpoint: Checkpoint) -> Any:
    """Read every parameter into its sharding. Raises ValueError naming a tensor that is missing or wrong."""
    family = family_of(checkpoint.config)
    sources = family.weight_map(model.cfg)
    _check_tensors(sources, checkpoint, family)
    shardings = dict(nnx.to_flat_state(model.shardings()))

    def load(path: Any, variable: Any) -> Any:
        source, want = sources[path], variable.get_value()
        value = source.assemble(*(checkpoint.read(name) for name in source.names))
        value = _fit(value, variable.get_metadata("dims"), model)
        assert value.shape == want.shape, (path, value.shape, want.shape)
        return variable.replace(_place(value, want.dtype, shardings[path].get_value()))

    return nnx.map_state(load, model.state)


def _check_tensors(sources: Mapping[Path, Source], checkpoint: Checkpoint, family: Family) -> None:
    expected = {
        name: shape for source in sources.values() for name, shape in zip(source.names, source.shapes, strict=True)
    }
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ValueError(f"the checkpoint has no tensor {name}; it is incomplete or not of family {family.name}")
        if tuple(info.shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(info.shape)}; the configuration says {shape}")
    for name in checkpoint.tensors:
        if name not in expected and not name.endswith(family.ignored_tensors):
            raise ValueError(f"the checkpoint has an unexpected tensor {name} that family {family.name} would not use")


def _fit(value: np.ndarray, dims: tuple[str, ...], model: AbstractModel) -> np.ndarray:
    """Repeat key/value heads and pad the vocabulary as this placement asks."""
    if "vocab" in dims and model.vocab_padding:
        return np.pad(value, ((0, model.vocab_padding), (0, 0)))
    if model.kv_copies == 1 or not {"heads", "heads_in"} & set(dims):
        return value
    groups = model.cfg.num_heads // model.cfg.num_kv_heads // model.kv_copies
    if "qkv" not in dims:  # [K, G, H, D] -> [K * copies, G / copies, H, D]
        return value.reshape(-1, groups, *value.shape[2:])
    d, k, _, h = value.shape
    queries = value[:, :, :-2].reshape(d, k * model.kv_copies, groups, h)
    return np.concatenate([queries, np.repeat(value[:, :, -2:], model.kv_copies, axis=1)], axis=2)


def _place(value: np.ndarray, dtype: jnp.dtype, sharding: jax.sharding.NamedSharding) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
        return np.ascontiguousarray(value[index]).astype(dtype, copy=False)

    return jax.make_array_from_callback(value.shape, sharding, shard)
