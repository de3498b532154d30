"""One dispatch as bytes, for processes that follow another: program key and host arrays, in a fixed schema.

A message is a header (program, bucket, greedy, number of arrays) and for each array its dtype, shape and bytes, in the
order of the fields of the program's inputs. No names, no code, no pickle: both ends know the schema, and what does
not fit it is refused. Little-endian.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import jax
import numpy as np

from jaxllm.runner.batch import RaggedBatch, RowBatch
from jaxllm.runner.sampler import SamplingRows

Key = tuple[str, int, bool]
# Every message there is; the last three say what to do with the programs instead of naming one.
NAMES = ("admit", "ragged", "hidden", "sample", "decode", "score", "pool", "copy", "reset", "warm_up", "stop")
_DTYPES = tuple(np.dtype(name) for name in ("int32", "uint32", "float32", "bool"))
_HEADER = struct.Struct("<BIBB")
_ARRAY = struct.Struct("<BB")


def encode(key: Key, inputs: tuple[Any, ...]) -> bytes:
    """A message. A mask that no row looks at is left out: it is the largest array by far."""
    name, bucket, greedy = key
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(_without_idle_masks(inputs))]
    parts = [_HEADER.pack(NAMES.index(name), bucket, greedy, len(leaves))]
    for leaf in leaves:
        parts.append(_ARRAY.pack(_DTYPES.index(leaf.dtype), leaf.ndim))
        parts.append(struct.pack(f"<{leaf.ndim}I", *leaf.shape))
        parts.append(np.ascontiguousarray(leaf).tobytes())
    return b"".join(parts)


def decode(message: bytes, vocab_size: int) -> tuple[Key, tuple[Any, ...]]:
    """The reverse. Raises ValueError for what is no message."""
    try:
        code, bucket, greedy, count = _HEADER.unpack_from(message)
        name, at, leaves = NAMES[code], _HEADER.size, []
        for _ in range(count):
            dtype, ndim = _ARRAY.unpack_from(message, at)
            shape = struct.unpack_from(f"<{ndim}I", message, at + _ARRAY.size)
            at += _ARRAY.size + 4 * ndim
            leaves.append(np.frombuffer(message, _DTYPES[dtype], math.prod(shape), at).reshape(shape))
            at += leaves[-1].nbytes
        structure = jax.tree.structure(_template(name, bool(greedy)))
        if at != len(message) or structure.num_leaves != count:
            raise ValueError(f"{len(message)} bytes and {count} arrays")
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"not a message between processes of one version: {error}") from None
    return (name, bucket, bool(greedy)), _with_masks(jax.tree.unflatten(structure, leaves), vocab_size)


def _template(name: str, greedy: bool) -> tuple[Any, ...]:
    """The inputs of a program, with a number where each array stands."""
    sampling = None if greedy else SamplingRows(*range(len(dataclasses.fields(SamplingRows))))
    rows = RowBatch(0, 1, 2, 3, sampling)
    if name in ("ragged", "hidden"):
        return (RaggedBatch(*range(len(dataclasses.fields(RaggedBatch)))),)
    return {
        "admit": (0, 1),
        "sample": (rows,),
        "decode": (rows, 0, 1),
        "score": (0,),
        "pool": (0,),
        "copy": (0, 1),
    }.get(name, ())


def _without_idle_masks(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = inputs[0] if inputs else None
    if not isinstance(rows, RowBatch) or rows.sampling is None or rows.sampling.masked.any():
        return inputs
    allowed = np.zeros((len(rows.slot), 0), np.int32)
    return (dataclasses.replace(rows, sampling=dataclasses.replace(rows.sampling, allowed=allowed)), *inputs[1:])


def _with_masks(inputs: tuple[Any, ...], vocab_size: int) -> tuple[Any, ...]:
    rows = inputs[0] if inputs else None
    if not isinstance(rows, RowBatch) or rows.sampling is None or rows.sampling.allowed.size:
        return inputs
    allowed = np.zeros((len(rows.slot), -(-vocab_size // 32)), np.int32)
    return (dataclasses.replace(rows, sampling=dataclasses.replace(rows.sampling, allowed=allowed)), *inputs[1:])


STOP = encode(("stop", 0, True), ())
