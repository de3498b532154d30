"""Host memory for weights: aligned so that the CPU backend takes it over without a copy, in huge pages where there are.

A decode iteration on a CPU reads every weight once. In pages of 4 KiB each of them costs an entry of the processor's
translation buffer as well, which has some thousand; Linux gives pages of 2 MiB to memory that asks for them
("transparent huge pages", `madvise`) and is that large. Matrices of small models are not, so they share chunks.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64  # bytes; what the CPU backend needs to take a host array over without a copy
_HUGE = 2 << 20  # bytes of a huge page
_CHUNK = 64 << 20  # bytes that matrices share

_lock = threading.Lock()
# The chunk begun last, as long as somebody uses it, and where its room begins.
_shared: tuple[Callable[[], np.ndarray | None], int] = (lambda: None, 0)


def aligned_zeros(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """Zeros that the CPU backend takes over without a copy, freed with the array."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes < 2 * _HUGE:
        buffer = np.zeros(num_bytes + _ALIGNMENT, np.uint8)
        first = -buffer.ctypes.data % _ALIGNMENT
    else:
        buffer, first = _mapped(num_bytes)
    return buffer[first : first + num_bytes].view(dtype).reshape(shape)


def lasting_zeros(shape: Sequence[int], dtype: jnp.dtype) -> np.ndarray:
    """As `aligned_zeros`, for what lives as long as a model: freed once all of its neighbours in memory are."""
    global _shared
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if num_bytes >= _CHUNK:
        return aligned_zeros(shape, dtype)
    with _lock:
        find, first = _shared
        chunk = find()
        if chunk is None or first + num_bytes > len(chunk):
            chunk, first = _mapped(_CHUNK)
            find = weakref.ref(chunk)
        _shared = find, first + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    return chunk[first : first + num_bytes].view(dtype).reshape(shape)


def _mapped(num_bytes: int) -> tuple[np.ndarray, int]:
    """Fresh zeros, and where in them a huge page begins from which on there are so many."""
    size = -(-num_bytes // _HUGE) * _HUGE  # the last page is a huge one too
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        whole = np.zeros(size + _HUGE, np.uint8)
    else:
        mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(mapping, np.uint8)
    return whole, -whole.ctypes.data % _HUGE
