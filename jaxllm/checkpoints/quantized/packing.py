"""Codes out of the 32-bit words that formats pack them into."""

from __future__ import annotations

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that each nibble of a word holds, from the lowest up


def unpacked(words: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 codes: dim `axis` grows by the codes of a word, the lowest bits first (or at the places of `order`)."""
    count = 32 // bits
    words = words.view(np.uint32)
    codes = np.empty((*words.shape[:axis], words.shape[axis], count, *words.shape[axis + 1 :]), np.uint8)
    for nth in range(count):
        place = nth if order is None else order[nth]
        codes[(*(slice(None),) * (axis + 1), place)] = (words >> np.uint32(nth * bits)) & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:axis], -1, *words.shape[axis + 1 :])


def covering(part: slice, count: int) -> tuple[slice, slice]:
    """The words that hold the codes of `part`, and where those lie among the words' codes."""
    first = part.start // count
    return slice(first, -(-part.stop // count)), slice(part.start - first * count, part.stop - first * count)
