"""Rows with low-rank matrices of their own equal float64 products of the same rounded numbers, row by row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.low_rank import (
    RowsBySlot,
    add_low_rank,
    pack_a,
    pack_b,
    product_and_low_rank,
    takes,
    unpack_a,
    unpack_b,
)
from jaxllm.ops.cpu.packed import matmul, pack

if reason := ffi.unavailable():
    pytest.skip(reason, allow_module_level=True)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))


class Case:
    """Random operands, both ways to multiply them, and what should come out."""

    def __init__(self, rows: int, k: int, n: int, slots: int, modules: int, rank: int):
        self.x, self.w, self.a = numbers(0, rows, k), numbers(1, k, n), numbers(2, slots, modules, rank, k)
        self.b, self.slots = numbers(3, slots, rank, n), slots
        self.module_of = tuple(panel * modules // (n // 32) for panel in range(n // 32))
        a_blocks = jnp.asarray(np.stack([pack_a(a) for a in self.a]))
        self.panels, self.b_panels = pack(self.w, (0,)), np.stack([pack_b(b) for b in self.b], axis=1)

        @jax.jit
        def together(x, slot):
            by_slot = RowsBySlot.of(slot, slots)
            return product_and_low_rank(x, self.panels, a_blocks, self.b_panels, by_slot, self.module_of)

        @jax.jit
        def apart(x, slot):
            y = matmul(x, jnp.asarray(self.panels))
            return add_low_rank(y, x, a_blocks, self.b_panels, RowsBySlot.of(slot, slots), self.module_of)

        self.ways = (together, apart)

    def expected(self, slot: np.ndarray) -> np.ndarray:
        x, w, a, b = (m.astype(np.float64) for m in (self.x, self.w, self.a, self.b))
        y, module = x @ w, np.repeat(self.module_of, 32)
        for row in np.flatnonzero(slot):
            h = np.einsum("k,prk->pr", x[row], a[slot[row] - 1])
            h = np.asarray(jnp.asarray(h, jnp.float32).astype(jnp.bfloat16), np.float64)
            y[row] += np.einsum("nr,rn->n", h[module], b[slot[row] - 1])
        return y


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((5, 64, 96, 3, 1, 4), id="one block"),
        pytest.param((32, 576, 960, 8, 3, 16), id="a decode"),
        pytest.param((40, 96, 64, 2, 2, 6), id="blocks of two"),
        pytest.param((1, 64, 32, 1, 1, 2), id="one row"),
        pytest.param((100, 128, 128, 4, 4, 8), id="several groups of a slot"),
    ],
)
def test_rows_have_their_own_matrices(sizes):
    case, rng = Case(*sizes), np.random.default_rng(0)
    rows, slots = sizes[0], case.slots
    for slot in (rng.integers(0, slots + 1, rows), np.full(rows, slots), np.zeros(rows, int)):
        want = case.expected(slot)
        got = [np.asarray(way(case.x, slot.astype(np.int32))) for way in case.ways]
        np.testing.assert_allclose(got[0], want, atol=1e-5 * np.abs(want).max(), rtol=0)
        np.testing.assert_array_equal(got[0], got[1])


def test_row_does_not_depend_on_the_rows_beside_it():
    case, rng = Case(24, 128, 96, 3, 1, 8), np.random.default_rng(1)
    slot = rng.integers(0, 4, 24).astype(np.int32)
    together = np.asarray(case.ways[0](case.x, slot))
    for order in (rng.permutation(24), np.arange(24)[::-1]):
        np.testing.assert_array_equal(np.asarray(case.ways[0](case.x[order], slot[order])), together[order])
    others = np.where(np.arange(24) == 5, slot, (slot + 1) % 4).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(case.ways[0](case.x, others))[5], together[5])


def test_kernels_that_run_at_once_on_all_devices_do_not_wait_for_each_other():
    """Later parts wait for the first ones, which nobody leaves undone."""
    case, slot = Case(24, 256, 512, 2, 1, 16), np.arange(24, dtype=np.int32) % 3
    want = np.asarray(case.ways[0](case.x, slot))

    def many(device: jax.Device) -> bool:
        here = jax.device_put((case.x, slot), device)
        return all(np.array_equal(np.asarray(case.ways[0](*here)), want) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, jax.devices()))


def test_blocks_and_panels_come_out_as_they_went_in():
    for rank in (6, 8):
        a = numbers(1, 3, rank, 64)
        np.testing.assert_array_equal(unpack_a(pack_a(a), rank), a)
    b = numbers(0, 6, 96)
    np.testing.assert_array_equal(unpack_b(pack_b(b)), b)


def test_only_even_bfloat16_matrices_of_whole_panels_are_taken():
    bfloat16 = np.dtype(jnp.bfloat16)
    assert takes(64, 96, 4, bfloat16)
    assert not takes(64, 96, 4, np.dtype(np.float32))
    assert not takes(64, 96, 3, bfloat16)
    assert not takes(48, 96, 4, bfloat16)
    assert not takes(64, 80, 4, bfloat16)
