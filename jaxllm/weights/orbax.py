"""Sharded parameters to and from an Orbax folder: each process writes and reads only the shards it owns.

What is stored does not depend on the mesh: no repeated key/value heads, no vocabulary padding. Restoring into
another mesh reads each device's slices; only heads that have to be repeated (tp above their number) are read
whole and repeated on the device.

A folder holds `config.json`, the tokenizer's files where the source had them, and `parameters/` (Orbax).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.weights.abstract import AbstractModel, abstract_model

FOLDER = "parameters"


def is_orbax(folder: Path) -> bool:
    """Whether `folder` was written by `save_parameters`."""
    return (folder / FOLDER).is_dir() and (folder / "config.json").is_file()


def save_parameters(model: AbstractModel, params: Any, folder: Path) -> None:
    """Write the parameters below `folder`. Raises ValueError where the mesh repeats heads or pads the vocabulary."""
    import orbax.checkpoint as ocp

    if model.kv_copies > 1 or model.vocab_padding:
        raise ValueError("this mesh repeats key/value heads or pads the vocabulary; convert on a mesh that does not")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / FOLDER, _flat(params))


def restore_parameters(model: AbstractModel, folder: Path) -> Any:
    """Read the parameters into this model's shardings. Raises ValueError naming a parameter that does not fit."""
    import orbax.checkpoint as ocp

    stored = abstract_model(model.cfg, model.placement, jnp.dtype(jnp.bfloat16), canonical=True)
    shapes = {name: leaf.shape for name, leaf in _flat(stored.state).items()}
    shardings = _flat(model.shardings())
    wanted = _flat(model.state)
    args = {
        name: _restore_args(ocp, shapes[name], want, shardings[name], model.placement.replicated)
        for name, want in wanted.items()
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = folder.absolute() / FOLDER
        found = _guarded(path, lambda: _stored_shapes(checkpointer.metadata(path)))
        _check(path, found, shapes)
        restored = _guarded(path, lambda: checkpointer.restore(path, restore_args=args))

    def fit(path: Any, variable: Any) -> Any:
        name, want = _name(path), variable.get_value()
        value = restored[name]
        if value.shape != want.shape:
            dims = variable.get_metadata("dims")
            expand = functools.partial(_repeat_heads, shape=want.shape, dims=dims)
            value = jax.jit(expand, out_shardings=shardings[name])(value)
        return variable.replace(model.storage(path, variable).from_array(value, shardings[name]))

    return nnx.map_state(fit, model.state)


def _stored_shapes(metadata: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in metadata.item_metadata.tree.items()}


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What a damaged folder makes Orbax raise has no common type; the user gets one line that names the folder."""
    try:
        return read()
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot be read as an Orbax checkpoint: {lines[0][:200]}") from error


def _flat(state: Any) -> dict[str, Any]:
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path: Any) -> str:
    return ".".join(map(str, path))


def _check(path: Path, found: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"{path}: has no parameter {name}; it is of another configuration")
        if found[name] != shape:
            raise ValueError(f"{path}: parameter {name} has shape {found[name]}; the configuration says {shape}")
    if unexpected := found.keys() - shapes.keys():
        raise ValueError(f"{path}: has an unexpected parameter {min(unexpected)}")


def _restore_args(ocp: Any, stored: tuple[int, ...], want: Any, sharding: Any, whole: Any) -> Any:
    """Straight into the shards; padded rows of a table come as zeros."""
    if stored == want.shape:
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=want.shape, dtype=want.dtype)
    if stored[1:] == want.shape[1:] and len(stored) == 2:
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=want.shape, dtype=want.dtype, strict=False)
    return ocp.ArrayRestoreArgs(sharding=whole, global_shape=stored, dtype=want.dtype)


def _repeat_heads(value: jax.Array, shape: tuple[int, ...], dims: tuple[str, ...]) -> jax.Array:
    """[.., K, X, ..] with each key/value head once -> [.., K * copies, X', ..] as this mesh has it."""
    if math.prod(value.shape) == math.prod(shape):  # queries alone: the groups of a head are dealt out
        return value.reshape(shape)
    axis = dims.index("heads")
    copies = shape[axis] // value.shape[axis]
    if "qkv" not in dims:
        return jnp.repeat(value, copies, axis=axis)
    queries, kv = jnp.split(value, [value.shape[axis + 1] - 2], axis=axis + 1)
    queries = queries.reshape(*shape[: axis + 1], -1, *shape[axis + 2 :])
    return jnp.concatenate([queries, jnp.repeat(kv, copies, axis=axis)], axis=axis + 1)
