"""Memory for weights: aligned, shared by small matrices, given back, and in huge pages where Linux has them."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config.quantization import Scheme
from jaxllm.weights import memory
from jaxllm.weights.memory import aligned_zeros, lasting_zeros
from jaxllm.weights.stored import choose_storage

HUGE = 2 << 20


def is_advised(address: int) -> bool:
    """Whether Linux was asked for huge pages where this lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:x} is not mapped")


has_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="Linux with transparent huge pages"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No chunk of other tests."""
    monkeypatch.setattr(memory, "_shared", (lambda: None, 0))


def test_small_matrices_share_a_chunk_that_lives_while_one_of_them_does():
    arrays = [lasting_zeros((n, 5), jnp.dtype("float32")) for n in (1, 7, 1000)]
    for value, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0 and not array.any()
        array[:] = value
    assert [set(array.flat) for array in arrays] == [{0}, {1}, {2}]
    find, _ = memory._shared
    assert all(np.shares_memory(array, find()) for array in arrays)
    array = arrays.pop()
    arrays.clear()
    gc.collect()
    assert find() is not None and set(array.flat) == {2}
    del array
    gc.collect()
    assert find() is None


def test_a_full_chunk_is_followed_by_a_new_one(monkeypatch):
    monkeypatch.setattr(memory, "_CHUNK", HUGE)
    arrays = [lasting_zeros((3 << 18,), jnp.dtype("uint8")) for _ in range(7)]
    for value, array in enumerate(arrays):
        array[:] = value
    assert [set(array[::4096]) for array in arrays] == [{value} for value in range(7)]


@has_huge_pages
@pytest.mark.parametrize("make", [aligned_zeros, lasting_zeros])
def test_large_matrices_begin_at_a_huge_page(make, monkeypatch):
    monkeypatch.setattr(memory, "_CHUNK", 2 * HUGE)
    array = make((2 * HUGE + 100,), jnp.dtype("uint8"))
    assert array.ctypes.data % HUGE == 0 and is_advised(array.ctypes.data) and is_advised(array[-1:].ctypes.data)


def test_a_system_without_huge_pages_has_aligned_memory(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    for make in (aligned_zeros, lasting_zeros):
        array = make((3, HUGE), jnp.dtype("uint8"))
        array[:] = 1
        assert array.ctypes.data % 64 == 0 and array.sum() == array.size


@has_huge_pages
@pytest.mark.parametrize("scheme", [None, Scheme(codes="int8"), Scheme(codes="uint4", group=64, offset=8)])
def test_the_devices_arrays_are_that_memory_and_no_copy_of_it(scheme):
    want, inputs = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16), (0,)
    kept = choose_storage(want, inputs, matmul="llvm", scheme=scheme, inputs=inputs)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("tp",)), jax.sharding.PartitionSpec())
    made = kept.from_array(jnp.ones(want.shape, want.dtype), sharding)
    for leaf in jax.tree.leaves(made):
        assert is_advised(leaf.unsafe_buffer_pointer()), leaf.shape
