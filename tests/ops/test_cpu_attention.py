"""The CPU kernel equals the oracle for every mix of rows and every option; a query's result knows nothing of its batch.

By default a sample of the random shapes; all of them with `JAXLLM_FULL_TESTS=1`.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxllm.bench.attention_cases import random_case, random_shape
from jaxllm.ops.attention import AttentionSpec, QuantizedPages, RaggedRows, SingleRows, xla
from jaxllm.ops.attention.kv import is_quantized, quantize
from jaxllm.ops.cpu import attention as cpu
from jaxllm.ops.cpu import ffi

if reason := ffi.unavailable():
    pytest.skip(reason, allow_module_level=True)
FULL = os.environ.get("JAXLLM_FULL_TESTS") == "1"
# Sinks, soft-cap, windows, latent rows, groups of 1 to 16 and the three kinds of cache are all among them.
SEEDS = range(64) if FULL else (0, 1, 2, 7, 16, 18, 28, 31, 56)
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.01, "int8": 2e-5}  # queries and exponentials are rounded to it
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def shape_of(seed: int):
    shape = random_shape(seed, DTYPES)
    return shape if FULL else dataclasses.replace(shape, longest=min(shape.longest, 600))


@pytest.mark.parametrize("seed", SEEDS)
def test_any_mix_of_rows_equals_the_oracle(seed):
    shape = shape_of(seed)
    kernel = jax.jit(functools.partial(cpu.attention, spec=shape.spec))
    oracle = jax.jit(functools.partial(xla.ragged_paged_attention, spec=shape.spec))
    for number in range(6):
        case = random_case(shape, 1000 * seed + number)
        assert cpu.unsupported(case.pages, shape.spec) is None
        got = np.asarray(kernel(case.q, case.pages, case.rows, sinks_KG=case.sinks))
        exact = case.pages.astype(jnp.float32) if shape.dtype == jnp.bfloat16 else case.pages
        want = np.asarray(oracle(case.q, exact, case.rows, sinks_KG=case.sinks))
        error = np.abs(got - want).max(initial=0)
        assert error <= TOLERANCE[jnp.dtype(shape.dtype).name], f"{shape} case {number}: {error:.1e}"


def pages_and_table(
    num_rows: int, longest: int, page_size: int = 16, heads: int = 2, width: int = 64, dtype=jnp.float32
):
    rng, per_row = np.random.default_rng(0), -(-longest // page_size)
    numbers = jnp.asarray(rng.standard_normal((num_rows * per_row + 1, 2, page_size, heads, width), np.float32))
    pages = QuantizedPages(*quantize(numbers, dtype)) if is_quantized(dtype) else numbers.astype(dtype)
    return pages, jnp.asarray(1 + rng.permutation(num_rows * per_row).reshape(num_rows, per_row), jnp.int32)


def test_decode_rows_of_any_length_equal_the_oracle_and_idle_rows_give_zeros():
    pages, table = pages_and_table(4, 2000)
    q = jax.random.normal(jax.random.key(0), (4, 2, 3, 64))
    spec = AttentionSpec(scale=0.125)
    kernel = jax.jit(functools.partial(cpu.attention, spec=spec))
    for lengths in ([2000, 0, 1, 65], [64, 1999, 777, 0], [0, 0, 0, 0]):
        kv_len = jnp.asarray(lengths, jnp.int32)
        got = np.asarray(kernel(q, pages, SingleRows(kv_len, table)))
        want = np.asarray(xla.single_query_attention(q, pages, kv_len, table, spec=spec))
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)
        assert (got[np.array(lengths) == 0] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "page_size", "before", "window"),
    [
        (jnp.float32, 16, 0, 70),
        (jnp.float32, 16, 0, None),
        (jnp.float32, 16, 1000, None),
        (jnp.float32, 16, 1000, 600),
        (jnp.bfloat16, 16, 0, None),
        (jnp.bfloat16, 16, 1000, 599),
        (jnp.bfloat16, 7, 1001, None),
        (jnp.int8, 16, 1000, None),
    ],
)
def test_query_has_the_same_bits_alone_in_a_batch_and_in_any_chunk(dtype, page_size, before, window):
    """Of a prompt's 150 tokens, with so many tokens before them: within a segment of keys, and over several."""
    pages, table = pages_and_table(3, before + 200, page_size, dtype=dtype)
    q = jax.random.normal(jax.random.key(1), (200, 2, 3, 64))
    kernel = jax.jit(functools.partial(cpu.attention, spec=AttentionSpec(scale=0.125, window=window)))

    def attend(*chunks: tuple[int, int, int]) -> list[np.ndarray]:
        """Queries `first .. end` of `row`'s 150 for each chunk, in one flat batch padded to 200."""
        count = [end - first for _, first, end in chunks]
        pad = [0] * (3 - len(chunks))
        starts = np.cumsum(count) - count
        flat = jnp.concatenate([q[first:end] for _, first, end in chunks] + [q[: 200 - sum(count)]])
        ints = [[*starts, *pad], [*count, *pad], [before + end for *_, end in chunks] + pad]
        tables = table[jnp.asarray([row for row, *_ in chunks] + pad)]
        rows = RaggedRows(*(jnp.asarray(x, jnp.int32) for x in ints), jnp.int32(0), tables)
        out = np.asarray(kernel(flat, pages, rows))
        assert not out[sum(count) :].any(), "queries of nobody give zeros"
        return [out[start : start + n] for start, n in zip(starts, count, strict=True)]

    (whole,) = attend((0, 0, 150))
    for chunks in ([(1, 3, 20), (0, 0, 91)], [(0, 149, 150)], [(0, 7, 64), (2, 0, 5), (1, 9, 90)]):
        for (row, first, end), part in zip(chunks, attend(*chunks), strict=True):
            assert row != 0 or np.array_equal(part, whole[first:end])
    decode = kernel(q[149:150], pages, SingleRows(jnp.asarray([before + 150], jnp.int32), table[:1]))
    assert np.array_equal(np.asarray(decode)[0], whole[149])


def test_heads_cut_over_devices_give_the_whole():
    shape = dataclasses.replace(random_shape(0, (jnp.float32,)), kv_heads=4, longest=300)
    case = random_case(shape, 1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",), axis_types=(AxisType.Auto,))
    kernel = functools.partial(cpu.attention, spec=shape.spec)
    heads, cached = PartitionSpec(None, "tp"), PartitionSpec(None, None, None, "tp")
    cut = jax.shard_map(
        lambda q, pages, rows: kernel(q, pages, rows),
        mesh=mesh,
        in_specs=(heads, cached, PartitionSpec()),
        out_specs=heads,
        check_vma=False,
    )
    whole = jax.jit(kernel)(case.q, case.pages, case.rows)
    assert np.array_equal(np.asarray(jax.jit(cut)(case.q, case.pages, case.rows)), np.asarray(whole))


def test_layers_that_it_cannot_take_are_named():
    spec = AttentionSpec(scale=1.0)
    assert "float8_e4m3fn" in str(cpu.unsupported(jnp.zeros((2, 2, 8, 1, 64), jnp.float8_e4m3fn), spec))
    assert "multiple of 4" in str(cpu.unsupported(jnp.zeros((2, 2, 8, 1, 6)), spec))
    assert "interleaved" in str(cpu.unsupported(jnp.zeros((2, 8, 2, 64)), spec))
