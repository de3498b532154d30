"""Memory-mapped files whose pages can be let go of: what was read once need not count as memory of the process."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


def map_file(path: Path) -> tuple[np.ndarray, mmap.mmap]:
    """The bytes of a non-empty file as a read-only array, and the mapping behind it. Raises OSError."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, np.uint8), mapping


def release_pages(mapping: mmap.mmap, start: int, num_bytes: int) -> None:
    """Drop the whole pages inside `[start, start + num_bytes)` from this process; views stay valid."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, first, length)
