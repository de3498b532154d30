"""Checkpoint -> sharded decoder parameters, one at a time.

The abstract decoder says which parameters exist, with shapes and dims; the family says of which parts of which
checkpoint tensors each is made. Missing, unexpected or misshapen tensors are refused by name before anything is
read, and every device's shard is read straight from the slices that it is made of.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxllm.checkpoints import Checkpoint
from jaxllm.checkpoints.quantized import QuantizedTensor, quantized_tensors
from jaxllm.config.quantization import Scheme
from jaxllm.families.registry import Family, family_of
from jaxllm.families.sources import Box, Read, Source, WeightMap, checkpoint_tensors
from jaxllm.families.tensor_names import named
from jaxllm.weights.abstract import AbstractModel
from jaxllm.weights.memory import aligned_zeros
from jaxllm.weights.pieces import read_pieces
from jaxllm.weights.rounding import Pieces, merged_inputs, round_to_nearest
from jaxllm.weights.schemes import JoinedScheme

_THREADS = 2  # parameters read at the same time; more only adds to the peak of memory
_PIECE_ELEMENTS = 1 << 19  # of a tensor handled at a time: what is read fits the processor's cache


def load_parameters(model: AbstractModel, checkpoint: Checkpoint) -> Any:
    """Read every parameter into its sharding, shard by shard: each process reads only the bytes it owns.

    Raises ValueError naming a tensor that is missing, unexpected or misshapen before any is read.
    """
    checkpoint = named(checkpoint)
    family = family_of(checkpoint.config)
    sources = family.weight_map(model.cfg, model.kv_copies)
    _check_tensors(sources, checkpoint, family)
    shardings, tensors = dict(nnx.to_flat_state(model.shardings())), quantized_tensors(checkpoint)

    def load(item: Any) -> Any:
        path, variable = item
        want = variable.get_value()
        read: Any = functools.partial(_read_box, sources[path], dtype=want.dtype, checkpoint=checkpoint)
        if (scheme := model.schemes.get(path)) is not None:
            inputs = variable.get_metadata("inputs")
            read = functools.partial(
                _read_quantized, sources[path], scheme, inputs, None if model.rounds else tensors, read
            )
        storage = model.storage(path, variable)
        return path, variable.replace(storage.from_pieces(want, shardings[path].get_value(), read))

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
        return variable.replace(model.storage(path, variable).from_array(array, sharding))

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


def read_values(source: Source, want: Any, checkpoint: Checkpoint, read: Read | None = None) -> np.ndarray:
    """A whole parameter as numbers, in the dtype of `want`; `read` instead of the checkpoint's own."""
    return _read_box(source, tuple(slice(0, size) for size in want.shape), want.dtype, checkpoint, read)


def _read_box(
    source: Source, box: Box, dtype: jnp.dtype, checkpoint: Checkpoint, read: Read | None = None
) -> np.ndarray:
    """A box of a parameter. Each piece's pages are let go of at once: the file never counts as memory."""
    out = aligned_zeros([part.stop - part.start for part in box], dtype)  # padding rows come from no tensor: zeros
    for name, target, value in source.pieces(box, read or checkpoint.read, _PIECE_ELEMENTS):
        out[target] = value if value.flags.c_contiguous else _transposed(value)
        checkpoint.release(name)
    return out


def _read_quantized(
    source: Source,
    scheme: Scheme | JoinedScheme,
    inputs: tuple[int, ...],
    tensors: Mapping[str, QuantizedTensor] | None,
    read: Callable[[Box], np.ndarray],
    box: Box,
) -> np.ndarray | Pieces:
    """A box as it is to be kept: as the checkpoint's `tensors` have it, or (None) rounded; plain where it is plain."""
    one = scheme.at(box[scheme.axis].start) if isinstance(scheme, JoinedScheme) else scheme
    if one is None:
        return read(box)
    if tensors is not None:
        return read_pieces(source.parts, box, one, inputs, tensors)
    return round_to_nearest(merged_inputs(read(box), inputs), one, inputs[0])


def _transposed(value: np.ndarray) -> np.ndarray:
    """A contiguous copy. The runtime's transpose works in tiles and is many times faster than NumPy's."""
    return np.asarray(jax.device_put(value, jax.local_devices(backend="cpu")[0]))
