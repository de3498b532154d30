"""What process 0 tells the others, as bytes: run a program on these host arrays, compile, start anew, stop.

A message is its kind, and of a program its number in the table, its bucket, and for each array its dtype, shape and
bytes in the order of the fields of the program's inputs. No names, no code, no pickle: both ends know the schema, and
what does not fit it is refused. Little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxllm.runner.batch import Dispatch
from jaxllm.runner.programs import PROGRAMS, SAMPLING, SCORING, TIERS

Structure = Callable[[str], Any]  # the `PyTreeDef` of a program's inputs
_NAMES = tuple(PROGRAMS)
_DTYPES = tuple(np.dtype(name) for name in ("int32", "uint32", "float32", "bool", "float16", ml_dtypes.bfloat16))
_DISPATCH = struct.Struct("<BBIB")  # kind, program, bucket, number of arrays
_ARRAY = struct.Struct("<BB")
_COUNT = struct.Struct("<I")
_KINDS = _RUN, _WARM_UP, _RESET, _STOP, _BRING_DOWN, _PUT_BACK, _FORGET = range(7)
_GROUPS = (SAMPLING, SCORING, TIERS)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """Compile these groups of programs, and those that are always compiled."""

    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BringDown:
    """Copy pages into host memory; the slabs are numbered from `first` on."""

    first: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PutBack:
    """Write the slabs of these numbers into pages."""

    pages: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Nobody will ask for the slabs of these numbers again."""

    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reset:
    """Empty pages and slots."""


@dataclass(frozen=True, slots=True)
class Stop:
    """There is no more to do."""


Message = Dispatch | WarmUp | BringDown | PutBack | Forget | Reset | Stop


def encode(message: Message) -> bytes:
    """A message as bytes."""
    if isinstance(message, WarmUp):
        return bytes([_WARM_UP, sum(1 << _GROUPS.index(group) for group in message.groups)])
    if isinstance(message, BringDown):
        return bytes([_BRING_DOWN]) + _numbers((message.first,)) + _numbers(message.pages)
    if isinstance(message, PutBack):
        return bytes([_PUT_BACK]) + _numbers(message.pages) + _numbers(message.numbers)
    if isinstance(message, Forget):
        return bytes([_FORGET]) + _numbers(message.numbers)
    if not isinstance(message, Dispatch):
        return bytes([_RESET if isinstance(message, Reset) else _STOP])
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(message.inputs)]
    parts = [_DISPATCH.pack(_RUN, _NAMES.index(message.program), message.bucket, len(leaves))]
    for leaf in leaves:
        parts.append(_ARRAY.pack(_DTYPES.index(leaf.dtype), leaf.ndim))
        parts.append(struct.pack(f"<{leaf.ndim}I", *leaf.shape))
        parts.append(np.ascontiguousarray(leaf).tobytes())
    return b"".join(parts)


def decode(data: bytes, structure: Structure) -> Message:
    """The reverse; `structure` gives that of a program's inputs. Raises ValueError for what is no message."""
    try:
        kind = _KINDS[data[0]]
        if kind == _RUN:
            return _dispatch(data, structure)
        if kind in (_BRING_DOWN, _PUT_BACK, _FORGET):
            return _moves(kind, data)
        if len(data) != 1 + (kind == _WARM_UP):
            raise ValueError(f"{len(data)} bytes")
        if kind == _WARM_UP:
            return WarmUp(tuple(group for i, group in enumerate(_GROUPS) if data[1] >> i & 1))
        return Reset() if kind == _RESET else Stop()
    except (struct.error, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"not a message between processes of one version: {error}") from None


def _dispatch(data: bytes, structure: Structure) -> Dispatch:
    _, code, bucket, count = _DISPATCH.unpack_from(data)
    name, at, leaves = _NAMES[code], _DISPATCH.size, []
    for _ in range(count):
        dtype, ndim = _ARRAY.unpack_from(data, at)
        shape = struct.unpack_from(f"<{ndim}I", data, at + _ARRAY.size)
        at += _ARRAY.size + 4 * ndim
        leaves.append(np.frombuffer(data, _DTYPES[dtype], math.prod(shape), at).reshape(shape))
        at += leaves[-1].nbytes
    inputs = structure(name)
    if at != len(data) or inputs.num_leaves != count:
        raise ValueError(f"{len(data)} bytes and {count} arrays")
    return Dispatch(name, bucket, jax.tree.unflatten(inputs, leaves))


def _numbers(values: tuple[int, ...]) -> bytes:
    return _COUNT.pack(len(values)) + struct.pack(f"<{len(values)}q", *values)


def _moves(kind: int, data: bytes) -> Message:
    lists, at = [], 1
    while at < len(data):
        (count,) = _COUNT.unpack_from(data, at)
        lists.append(struct.unpack_from(f"<{count}q", data, at + _COUNT.size))
        at += _COUNT.size + 8 * count
    if kind == _FORGET:
        (numbers,) = lists
        return Forget(numbers)
    one, other = lists
    if kind == _PUT_BACK:
        return PutBack(one, other)
    (first,) = one
    return BringDown(first, other)


STOP = encode(Stop())
