"""Pages cut otherwise: slabs of one layout -> rows of tokens in the logical layout -> slabs of another.

In the logical layout an array is `[L, 2, T, K, ...]`: T tokens in sequence, each key/value head once, whatever the page
size, the copies of heads and the order that either side's kernels want. It is what leaves one engine for another.

Dimension letters: L layers, T tokens, C tokens per page, K key/value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.kv.layout import PageLayout
from jaxllm.ops.attention.kv import SCALE_DTYPE, is_quantized

Rows = list[np.ndarray]  # per leaf of a slab (values, and scales of an 8-bit cache): `[L, 2, T, K, ...]`


def rows_of(slabs: Sequence[Any], layout: PageLayout, start: int, stop: int) -> Rows:
    """The tokens `[start, stop)` of these pages in sequence, counted from the first page's first token."""
    pages = [[layout.to_logical(np.asarray(leaf)) for leaf in jax.tree.leaves(slab)] for slab in slabs]
    return [np.concatenate(leaves, axis=2)[:, :, start:stop] for leaves in zip(*pages, strict=True)]


def slab_of(rows: Rows, layout: PageLayout, offset: int, structure: Any) -> Any:
    """One page with these tokens from `offset` on and zeros elsewhere, as a slab of this tree structure."""

    def page(row: np.ndarray) -> np.ndarray:
        layers, halves, tokens, *rest = row.shape
        if tokens == layout.page_size:
            return layout.from_logical(row)
        whole = np.zeros((layers, halves, layout.page_size, *rest), row.dtype)
        whole[:, :, offset : offset + tokens] = row
        return layout.from_logical(whole)

    return jax.tree.unflatten(structure, [page(row) for row in rows])


def row_shapes(layout: PageLayout, num_layers: int) -> list[tuple[tuple[int, ...], tuple[int, ...], np.dtype]]:
    """Of each leaf of the logical layout: the dims before and after T, and the dtype."""
    row, first = layout.row, (num_layers, layout.row.halves)
    values = (first, (row.heads, row.width), np.dtype(layout.dtype))
    if not is_quantized(layout.dtype):
        return [values]
    return [values, (first, (row.heads,), np.dtype(SCALE_DTYPE))]


def row_bytes(layout: PageLayout, num_layers: int) -> int:
    """Bytes of one token in the logical layout: what it costs to move it, `K_tok`."""
    return sum(int(np.prod(a + b)) * dtype.itemsize for a, b, dtype in row_shapes(layout, num_layers))
