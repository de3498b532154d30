"""Page moves against NumPy, and the logical shape of a page whatever the layout."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import CacheRow
from jaxllm.kv.layout import PageLayout
from jaxllm.kv.memory import write_pages
from jaxllm.kv.page_programs import MOVE_BATCH, copy_pages, put_pages, take_pages
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules

RNG = np.random.default_rng(0)


def pages(dtype: str) -> list[jax.Array]:
    return [jnp.asarray(RNG.integers(0, 100, (12, 2, 4, 2, 8)), dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_pages_are_copied_taken_and_put_as_numpy_would(dtype: str) -> None:
    layers = pages(dtype)
    before = [np.asarray(layer) for layer in layers]
    source, target = np.array([1, 2, 3, 0, 0, 0, 0, 0]), np.array([2, 3, 9, 0, 0, 0, 0, 0])
    copied = [np.asarray(layer) for layer in jax.jit(copy_pages)(layers, source, target)]
    for old, new in zip(before, copied, strict=True):
        assert np.array_equal(new[[2, 3, 9]], old[[1, 2, 3]]), "all are read before any is written"
        assert np.array_equal(np.delete(new, [0, 2, 3, 9], 0), np.delete(old, [0, 2, 3, 9], 0))
    index = np.array([5, 7, 11, 0, 0, 0, 0, 0])
    slabs = jax.jit(take_pages)(layers, index)
    assert len(slabs) == MOVE_BATCH
    assert np.array_equal(np.asarray(slabs[1]), np.stack([layer[7] for layer in before]))
    put = [np.asarray(layer) for layer in jax.jit(put_pages)(layers, np.array([1, 2, 3, 0, 0, 0, 0, 0]), slabs)]
    for old, new in zip(before, put, strict=True):
        assert np.array_equal(new[[1, 2, 3]], old[[5, 7, 11]])
        assert np.array_equal(new[4:], old[4:])


@pytest.mark.parametrize("rest", [(8,), ()])
def test_every_layout_has_one_logical_shape(rest: tuple[int, ...]) -> None:
    logical = RNG.normal(size=(3, 2, 4, 2, *rest))
    for copies in (1, 2):
        for interleaved in (False, True):
            layout = PageLayout(
                row=CacheRow(halves=2, heads=2, width=8, is_cut=True),
                num_pages=1,
                page_size=4,
                kv_copies=copies,
                dtype=jnp.dtype(jnp.float32),
                interleaved=interleaved,
            )
            lying = layout.from_logical(logical)
            heads = 2 * copies
            assert lying.shape == ((3, 4, 2 * heads, *rest) if interleaved else (3, 2, 4, heads, *rest))
            assert np.array_equal(layout.to_logical(lying), logical)
    interleaved = dataclasses.replace(layout, kv_copies=1).from_logical(logical)
    assert np.array_equal(interleaved[:, :, 0], logical[:, 0, :, 0]), "first the key of head 0"
    assert np.array_equal(interleaved[:, :, 1], logical[:, 1, :, 0]), "then its value"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_small_floats_kept_as_integers_are_the_same_numbers_and_written_without_a_copy(dtype: str) -> None:
    row = CacheRow(halves=2, heads=2, width=8, is_cut=True)
    sizes = {"row": row, "num_pages": 4000, "page_size": 4, "kv_copies": 1, "dtype": jnp.dtype(dtype)}
    placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
    plain, kept = (PageLayout(**sizes, as_integers=flag) for flag in (False, True))
    numbers, integers = (
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout.abstract(placement))
        for layout in (plain, kept)
    )
    assert all(np.issubdtype(leaf.dtype, np.integer) for leaf in jax.tree.leaves(integers))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(integers))
    kv, slots = jnp.asarray(RNG.normal(size=(5, 2, 2, 8)), jnp.float32), jnp.asarray([4, 9, 1, 15999, 7])
    program = jax.jit(write_pages, donate_argnums=0).lower(integers, kv, slots).compile()
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < size / 20, f"{temporary} bytes of temporaries for a cache of {size}: it is converted or copied"
    written = [np.asarray(leaf) for leaf in jax.tree.leaves(write_pages(numbers, kv, slots))]
    for want, got in zip(written, jax.tree.leaves(program(integers, kv, slots)), strict=True):
        assert np.array_equal(want.view(got.dtype), np.asarray(got))
        slab = np.asarray(got)[None, :1]
        logical = kept.to_logical(slab[:, 0])
        assert logical.dtype == want.dtype
        assert np.array_equal(kept.from_logical(logical), slab[:, 0])
