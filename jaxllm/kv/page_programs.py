"""Programs that move whole pages: copy them on the device, take them out of the page arrays, put them back.

Pages are a list over layers of arrays (or trees of arrays) `[P, ...]`; a slab is one page over all layers, the same
tree with leaves `[L, ...]`: a page crosses to the host as one run of bytes, not as one small piece for each layer. A
fixed number of pages moves at a time; rows that are not needed point to page 0.

Dimension letters: P pages, L layers, G pages moved together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

MOVE_BATCH = 8  # pages per dispatch: one program of each kind, and little waste for one page


def copy_pages(pages: Sequence[Any], source_G: jax.Array, target_G: jax.Array) -> list[Any]:
    """Copy pages inside every layer; all are read before any is written."""
    return jax.tree.map(lambda layer: set_rows(layer, target_G, layer[source_G]), list(pages))


def take_pages(pages: Sequence[Any], index_G: jax.Array) -> list[Any]:
    """G slabs."""
    stacked = jax.tree.map(lambda *layers: jnp.stack([layer[index_G] for layer in layers], axis=1), *pages)
    return [jax.tree.map(lambda leaf, g=g: leaf[g], stacked) for g in range(index_G.shape[0])]


def put_pages(pages: Sequence[Any], index_G: jax.Array, slabs: Sequence[Any]) -> list[Any]:
    """Write G slabs into the page arrays."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *slabs)  # [L, G, ...]
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(pages))]
    return [
        jax.tree.map(lambda old, new: set_rows(old, index_G, new), layer, row)
        for layer, row in zip(pages, rows, strict=True)
    ]


def slab_struct(pages: Sequence[Any]) -> Any:
    """Shapes and shardings of one slab, from the page arrays or their shapes: cut as the pages are."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec(None, *tuple(leaf.sharding.spec)[1:])
        sharding = NamedSharding(leaf.sharding.mesh, spec)
        return jax.ShapeDtypeStruct((len(pages), *leaf.shape[1:]), leaf.dtype, sharding=sharding)

    return jax.tree.map(struct, pages[0])


def device_bytes(arrays: Any) -> int:
    """Bytes over all devices of arrays given as shapes with shardings, copies included."""
    return sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize * len(s.sharding.device_set)
        for s in jax.tree.leaves(arrays)
    )


def set_rows(flat: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
    """`flat[at] = rows`."""
    return flat.at[at].set(rows.astype(flat.dtype), mode="promise_in_bounds", wrap_negative_indices=False)
