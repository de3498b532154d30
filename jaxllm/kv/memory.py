"""The KV cache of one mesh: page arrays on its devices, whose page is whose, and what is kept below them.

Made outside and handed to engine and runner, so that two engines can hand pages over and several models share one
memory. Page 0 of each replica belongs to nobody: padding writes there.

Dimension letters: P pages, C tokens per page, K key/value heads, H head width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxllm.kv.layout import PageLayout
from jaxllm.kv.page_programs import device_bytes, set_rows, slab_struct
from jaxllm.ops.attention.kv import QuantizedPages, as_kept, numbers_dtype, quantize, split_pages
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.tiers import Tiers
from jaxllm.sharding.mesh import Placement

if TYPE_CHECKING:
    from jaxllm.kv.mover import Mover


@dataclass(slots=True)
class KVMemory:
    """Pages and their books.

    Attributes:
        layout: of one layer's pages.
        num_layers: layers that have pages.
        placement: the mesh, and how it is cut.
        pools: one for each data-parallel replica: who has which page.
        pages: per layer the array (or pytree of arrays) on the devices; empty until `allocate`.
        draft_layout, num_draft_layers, draft_pages: the same of the draft model, whose pages have the same numbers:
            whoever has a page has it in both. They stay on the device: what a tier brings back is badly
            drafted from.
        tiers, mover: what is kept below the devices, and who carries it there and back; None where nothing is.
    """

    layout: PageLayout
    num_layers: int
    placement: Placement
    pools: list[PagePool]
    pages: list[Any] = field(default_factory=list)
    tiers: Tiers | None = None
    mover: Mover | None = None
    draft_layout: PageLayout | None = None
    num_draft_layers: int = 0
    draft_pages: list[Any] = field(default_factory=list)
    _zeros: tuple[Callable[[], Any], ...] = ()

    def allocate(self) -> None:
        """Zeroed pages; what was there is freed first."""
        self.pages, self.draft_pages = [], []
        if not self._zeros:
            layouts = (self.layout, self.draft_layout or self.layout)
            self._zeros = tuple(_zeros(layout.abstract(self.placement)) for layout in layouts)
        zeros, draft_zeros = self._zeros
        self.pages = [zeros() for _ in range(self.num_layers)]
        self.draft_pages = [draft_zeros() for _ in range(self.num_draft_layers)]

    def abstract(self) -> list[Any]:
        """The pages as shapes with shardings."""
        return [self.layout.abstract(self.placement)] * self.num_layers

    def abstract_draft(self) -> list[Any]:
        """The same of the draft model's."""
        return [(self.draft_layout or self.layout).abstract(self.placement)] * self.num_draft_layers

    def slab(self) -> Any:
        """Shapes and shardings of one page over all layers."""
        return slab_struct(self.abstract())

    @property
    def page_bytes(self) -> int:
        """Of one page over all layers and the devices that hold it."""
        return device_bytes(self.abstract()) // self.layout.num_pages

    @property
    def host_page_bytes(self) -> int:
        """Of one page in this process's host memory: what its own devices hold of it."""
        mesh = self.placement.mesh
        return self.page_bytes * len(mesh.local_devices) // mesh.size


def _zeros(like: Any) -> Callable[[], Any]:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like), out_shardings=shardings)


def write_pages(pages: Any, kv_TK2H: jax.Array, slots_T: jax.Array) -> Any:
    """Write each token's keys and values at its slot (`page * C + offset`), in place when the arrays are donated."""
    values, scales = split_pages(pages)
    if values.ndim == 4:
        rows = kv_TK2H.reshape(kv_TK2H.shape[0], *values.shape[2:])
        return set_rows(values.reshape(-1, *values.shape[2:]), slots_T, rows).reshape(values.shape)
    _, halves, page_size, _, _ = values.shape
    # Each page holds C rows of keys, then C rows of values (or only C rows that are both).
    keys_at = slots_T + slots_T // page_size * page_size * (halves - 1)
    at = jnp.concatenate([keys_at + i * page_size for i in range(halves)])

    rows = kv_TK2H.transpose(2, 0, 1, 3).reshape(-1, *values.shape[3:])

    def written(array: jax.Array, rows: jax.Array) -> jax.Array:
        return set_rows(array.reshape(-1, *array.shape[3:]), at, as_kept(rows, array.dtype)).reshape(array.shape)

    if scales is None:
        return written(values, rows)
    small, scale = quantize(rows, numbers_dtype(values.dtype))
    return QuantizedPages(written(values, small), written(scales, scale))
