"""One `.safetensors` file: path -> checked table of tensors and memory-mapped arrays.

The header is checked before it is believed: its length against the file, its JSON, each dtype and shape, and
that the tensors fill the data without gap or overlap. Knows nothing of models, or of files that belong
together. Format: the safetensors specification of Hugging Face.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.base import CheckpointError, TensorInfo
from jaxllm.checkpoints.mapped import map_file, release_pages

_MAX_HEADER = 100_000_000  # the format's own limit
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A mapped file; `starts` are byte offsets into `_data`."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    _starts: Mapping[str, int]
    _data: np.ndarray
    _map: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Check the header of `path` and map the file.

        Raises:
            CheckpointError: The file cannot be opened or is not a safetensors file that can be trusted.
        """
        try:
            if path.stat().st_size < 8:
                raise CheckpointError(f"{path}: not a safetensors file: shorter than its 8-byte header length")
            data, mapping = map_file(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror or error}") from error
        try:
            return cls(path, *_parse(data), data, mapping)
        except _Damaged as error:
            raise CheckpointError(f"{path}: {error}; it is truncated or damaged: fetch it again") from error

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A read-only view of the file, or a copy where the tensor is not aligned to its item size."""
        info, start = self.tensors[name], self._starts[name]
        dtype = np.dtype(info.dtype)
        raw = self._data[start : start + math.prod(info.shape) * dtype.itemsize]
        part = raw.view(dtype).reshape(info.shape)[index or ()]
        return part if part.flags.aligned else part.copy()

    def release(self, name: str) -> None:
        """Let go of the tensor's pages; they come back from the file if it is read again."""
        info = self.tensors[name]
        release_pages(self._map, self._starts[name], math.prod(info.shape) * np.dtype(info.dtype).itemsize)


class _Damaged(Exception):
    """What is wrong with the header; becomes a `CheckpointError` that names the file."""


def _damaged(what: str) -> NoReturn:
    raise _Damaged(what)


def _parse(data: np.ndarray) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(_MAX_HEADER, data.size - 8):
        _damaged(f"the header claims {length} bytes, the file has {data.size} and the limit is {_MAX_HEADER}")
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, tuple[int, int]] = {}
    for name, entry in _header(data[8 : 8 + length].tobytes()).items():
        if name != "__metadata__":
            tensors[name], places[name] = _entry(name, entry)
    _check_places(places, data.size - 8 - length)
    return tensors, {name: 8 + length + begin for name, (begin, _) in places.items()}


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 alike
        _damaged(f"the header is not JSON ({error})")
    if not isinstance(header, dict):
        _damaged("the header is not a JSON object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = [name for name, _ in pairs]
        _damaged(f"{next(name for name in seen if seen.count(name) > 1)!r} appears twice in the header")
    return result


def _entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(word, str) or word not in _DTYPES:
        _damaged(f"tensor {name!r} has dtype {word!r}, expected one of {', '.join(_DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        _damaged(f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}, expected whole numbers from 0 up")
    dtype = np.dtype(_DTYPES[word])
    num_bytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != num_bytes:
        _damaged(f"tensor {name!r} of {word} {shape} takes {num_bytes} bytes, its offsets are {offsets}")
    return TensorInfo(tuple(shape), dtype.name), (offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_places(places: Mapping[str, tuple[int, int]], num_bytes: int) -> None:
    """The tensors, in file order, must cover the data exactly, as the format demands."""
    position = 0
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin < position:
            _damaged(f"tensor {name!r} overlaps the one before it")
        if begin > position:
            _damaged(f"tensor {name!r} starts at {begin} of the data, expected {position}")
        if end > num_bytes:
            _damaged(f"tensor {name!r} ends at {end} of the data, which has {num_bytes} bytes")
        position = end
    if position != num_bytes:
        _damaged(f"the tensors take {position} bytes, the data has {num_bytes}")
