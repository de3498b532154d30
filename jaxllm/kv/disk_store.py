"""The disk tier: one checksummed file per page, in a bounded folder that outlives the process.

Keys and NumPy arrays in, the same arrays out or nothing: a page that is damaged, half written, or of another model,
shape or dtype is a miss. Knows nothing of devices, shardings or repeated key/value heads: arrays come in the logical
shape `[layers, 2, C, K, H]`; of an 8-bit cache also the scales, `[layers, 2, C, K]`. Safe for several threads, and for
several processes in one folder.

File format 1, little endian: 8 bytes magic, uint32 length of the header, the header as JSON (format, model, key, shape
and dtype of each array), the arrays' bytes in C order, and SHA-256 over all of that.

Files are written under another name, flushed to the disk and renamed: what has its final name is whole, whenever the
process is killed. The checksum is for what happens to it later.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the names of bfloat16 and the 8-bit floats)
import numpy as np

FORMAT = 1
_MAGIC = b"jaxllmKV"
_SUFFIX = ".kvpage"
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class PageFormat:
    """What every page of one model looks like: its name, and shape and dtype name of each array."""

    model: str
    arrays: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def num_bytes(self) -> int:
        """Of the arrays alone."""
        return sum(int(np.prod(shape)) * np.dtype(name).itemsize for shape, name in self.arrays)

    def header(self, key: bytes) -> dict[str, Any]:
        """The header that a page of this layout has."""
        arrays = [{"shape": list(shape), "dtype": name} for shape, name in self.arrays]
        return {"format": FORMAT, "model": self.model, "key": key.hex(), "arrays": arrays}


class DiskStore:
    """Pages of one layout in a folder of at most `capacity` bytes, least recently used out first.

    Raises:
        ValueError: where the folder cannot be made or read.
    """

    def __init__(self, folder: Path, capacity: int, layout: PageFormat):
        self.folder, self.capacity, self.layout = folder, capacity, layout
        self.num_bytes = self.num_evictions = self.num_written = self.num_damaged = 0
        self._sizes: OrderedDict[bytes, int] = OrderedDict()  # oldest use first
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._scan()
        except OSError as error:
            raise ValueError(f"the folder {folder} cannot hold KV pages ({error}); give another disk_kv_path") from None
        with self._lock:
            self._make_room(0)

    def _scan(self) -> None:
        found = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(_SUFFIX):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, bytes.fromhex(entry.name.removesuffix(_SUFFIX)), stat.st_size))
            elif _is_abandoned(entry.name):
                Path(entry.path).unlink(missing_ok=True)
        for _, key, size in sorted(found):
            self._sizes[key] = size
            self.num_bytes += size

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def write(self, key: bytes, arrays: Sequence[np.ndarray]) -> bool:
        """Keep a page. False where it is not kept: no room, or the disk refuses."""
        given = tuple((a.shape, a.dtype.name) for a in arrays)
        assert given == self.layout.arrays, f"a page of {given} for a store of {self.layout.arrays}"
        content = encode(self.layout.header(key), arrays)
        with self._lock:
            if key in self._sizes or not self._make_room(len(content)):
                return False
            self._sizes[key] = len(content)  # counted before it is there: the bound holds at every moment
            self.num_bytes += len(content)
        try:
            _write_whole(self._path(key), content)
        except OSError:
            self._forget(key)
            return False
        self.num_written += 1
        return True

    def read(self, key: bytes) -> list[np.ndarray] | None:
        """A page's arrays, or None; what is damaged is deleted."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:  # another process may have evicted it
            self._forget(key)
            return None
        arrays = decode(content, self.layout.header(key))
        if arrays is None:
            self.num_damaged += 1
            path.unlink(missing_ok=True)
            self._forget(key)
            return None
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)
        return arrays

    def _make_room(self, size: int) -> bool:
        while self._sizes and self.num_bytes + size > self.capacity:
            key, freed = self._sizes.popitem(last=False)
            self._path(key).unlink(missing_ok=True)
            self.num_bytes -= freed
            self.num_evictions += 1
        return self.num_bytes + size <= self.capacity

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self.num_bytes -= self._sizes.pop(key, 0)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}{_SUFFIX}"


def encode(header: dict[str, Any], arrays: Sequence[np.ndarray]) -> bytes:
    """One page as a file."""
    text = json.dumps(header, sort_keys=True).encode()
    body = [_MAGIC, len(text).to_bytes(4, "little"), text, *(np.ascontiguousarray(a).tobytes() for a in arrays)]
    content = b"".join(body)
    return content + hashlib.sha256(content).digest()


def decode(content: bytes, header: dict[str, Any]) -> list[np.ndarray] | None:
    """The arrays of a file, or None unless it is whole and has exactly this header."""
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    text = json.dumps(header, sort_keys=True).encode()
    start = len(_MAGIC) + 4 + len(text)
    if body[:start] != _MAGIC + len(text).to_bytes(4, "little") + text:
        return None
    arrays = []
    for array in header["arrays"]:
        dtype, count = np.dtype(array["dtype"]), int(np.prod(array["shape"]))
        if len(body) < start + count * dtype.itemsize:
            return None
        arrays.append(np.frombuffer(body, dtype, count, start).reshape(array["shape"]))
        start += count * dtype.itemsize
    return arrays if start == len(body) else None


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _is_abandoned(name: str) -> bool:
    """Whether a temporary file's writer is gone. Should it be alive elsewhere, its rename fails and nothing is lost."""
    parts = name.split(".")
    if len(parts) != 4 or parts[3] != "tmp" or not parts[1].isdigit():
        return False
    try:
        os.kill(int(parts[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(parts[1]) == os.getpid()
