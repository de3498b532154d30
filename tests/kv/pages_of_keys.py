"""Keys and the page that belongs to each: a wrong page is one that is not its key's."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from jaxllm.kv.disk_store import PageFormat

LAYOUT = PageFormat("model", (((2, 2, 8, 2, 16), "float32"),))


@functools.cache
def key_of(i: int) -> bytes:
    """The key of page `i`."""
    return hashlib.sha256(str(i).encode()).digest()


def page_of(i: int) -> list[np.ndarray]:
    """The arrays of page `i`."""
    return [np.random.default_rng(i).normal(size=shape).astype(name) for shape, name in LAYOUT.arrays]
