"""The header of a GGUF file (v2 and v3, little endian): path -> metadata and a table of tensors.

Nothing in the file is believed: each count, length, dimension, alignment and offset is compared, as a Python
integer that cannot overflow, with the bytes that are really there before anything is allocated for it.
Knows nothing of architectures, of Hugging Face names or of how blocks are dequantised.
Format: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.ggml_types import TENSOR_TYPES

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 4
_MAX_ARRAY = 1 << 24  # a vocabulary has under a million entries; keeps a damaged length from filling the memory
_MAX_NESTING = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is outermost first; `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Metadata as Python values (arrays as lists) and the tensors by their GGUF names."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Parse and check the header of the GGUF file at `path`; no tensor data is touched.

    Raises:
        CheckpointError: The file cannot be opened, or is not a GGUF file that can be trusted.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise CheckpointError(f"{path}: not a GGUF file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(path, data, len(data)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from error


def _parse(cursor: _Cursor) -> GGUFHeader:
    magic = cursor.take(4, "magic")
    if magic == b"vers":
        cursor.fail("not a GGUF file but perhaps a Git LFS pointer to one: fetch the file itself (git lfs pull)")
    if magic != b"GGUF":
        cursor.fail(f"not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
    version = cursor.number("<u4", "version")
    if version not in (2, 3):
        big = ", perhaps a big-endian file" if version.to_bytes(4, "little")[:2] == b"\0\0" else ""
        cursor.fail(f"GGUF version {version} is not supported{big}; expected little-endian version 2 or 3")
    # A tensor entry takes at least 24 bytes, a metadata entry at least 13.
    num_tensors = cursor.count("tensor count", 24)
    num_entries = cursor.count("metadata count", 13)
    metadata = _metadata(cursor, num_entries)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.fail(f"general.alignment={alignment!r}; expected a power of two up to {_MAX_ALIGNMENT}")
    return GGUFHeader(metadata, _tensors(cursor, num_tensors, alignment))


def _metadata(cursor: _Cursor, num_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string("metadata key")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.number("<u4", key), key)
    return metadata


def _tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
    entries: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string("tensor name")
        if name in entries:
            cursor.fail(f"tensor {name!r} appears twice")
        entries[name] = _tensor(cursor, name, alignment)
    start = -(-cursor.position // alignment) * alignment
    placed = {
        name: GGUFTensor(tensor.shape, tensor.type, start + tensor.offset, tensor.nbytes)
        for name, tensor in entries.items()
    }
    _check_places(cursor, placed)
    return placed


def _tensor(cursor: _Cursor, name: str, alignment: int) -> GGUFTensor:
    num_dims = cursor.number("<u4", name)
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail(f"tensor {name!r} has {num_dims} dimensions; expected 1 to {_MAX_DIMS}")
    shape = tuple(cursor.number("<u8", name) for _ in range(num_dims))[::-1]
    type_id, offset = cursor.number("<u4", name), cursor.number("<u8", name)
    if type_id not in TENSOR_TYPES:
        cursor.fail(f"tensor {name!r} has the unknown type {type_id}")
    type_name, block_elements, block_bytes = TENSOR_TYPES[type_id]
    if min(shape) < 1 or shape[-1] % block_elements:
        cursor.fail(f"tensor {name!r} has shape {shape}; {type_name} needs rows of n * {block_elements} > 0")
    if offset % alignment:
        cursor.fail(f"tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
    return GGUFTensor(shape, type_name, offset, math.prod(shape) // block_elements * block_bytes)


def _check_places(cursor: _Cursor, tensors: dict[str, GGUFTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > cursor.size:
            cursor.fail(
                f"tensor {name!r} ends at byte {tensor.offset + tensor.nbytes}, the file at {cursor.size}; "
                "it is truncated or damaged: fetch it again"
            )
    for (first, a), (second, b) in pairwise(sorted(tensors.items(), key=lambda item: item[1].offset)):
        if a.offset + a.nbytes > b.offset:
            cursor.fail(f"tensors {first!r} and {second!r} overlap")


class _Cursor:
    """Reads forward through `data` and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.position = path, data, size, 0

    def fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}")

    def take(self, num_bytes: int, what: str) -> bytes:
        end = self.position + num_bytes
        if end > self.size:
            self.fail(
                f"{what!r} needs {num_bytes} bytes at {self.position}, the file ends at {self.size}; "
                "it is truncated or damaged: fetch it again"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, dtype: str, what: str) -> Any:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize, what), kind)[0].item()

    def count(self, what: str, min_bytes: int) -> int:
        """A 64-bit count of things that take at least `min_bytes` each."""
        count = self.number("<u8", what)
        if count * min_bytes > self.size - self.position:
            self.fail(f"{what!r} says {count}, more than the file of {self.size} bytes can hold")
        return count

    def string(self, what: str) -> str:
        return self.text(self.take(self.count(what, 1), what), what)

    def text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what!r} is not UTF-8: {raw[:32]!r}")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY or depth == _MAX_NESTING:
            self.fail(f"{what!r} has the unknown value type {kind}" if kind != _ARRAY else f"{what!r} nests too deep")
        inner = self.number("<u4", what)
        item_bytes = np.dtype(_SCALARS[inner]).itemsize if inner in _SCALARS else 8 if inner == _STRING else 12
        count = self.count(what, item_bytes)
        if count > _MAX_ARRAY:
            self.fail(f"{what!r} has {count} items; expected at most {_MAX_ARRAY}")
        if inner in _SCALARS:
            return np.frombuffer(self.take(count * item_bytes, what), _SCALARS[inner]).tolist()
        if inner == _STRING:
            return self.strings(count, what)
        return [self.value(inner, what, depth + 1) for _ in range(count)]

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; written out because a vocabulary and its merges are 100 000 of them."""
        data, size, position, raw = self.data, self.size, self.position, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = position + 8
            if start > size or (position := start + unpack(data, start - 8)[0]) > size:
                self.fail(
                    f"a string of {what!r} runs past the end of the file at {size}; "
                    "it is truncated or damaged: fetch it again"
                )
            raw.append(data[start:position])
        self.position = position
        return [self.text(item, what) for item in raw]
