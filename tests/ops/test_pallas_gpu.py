"""The GPU kernel, interpreted, equals the oracle for every mix of rows and every option; it lowers to Triton for CUDA.

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
from jaxllm.ops.attention import AttentionSpec, QuantizedPages, RaggedRows, SingleRows, pallas_gpu, xla
from jaxllm.ops.attention.kv import is_quantized

FULL = os.environ.get("JAXLLM_FULL_TESTS") == "1"
SHAPES = range(64) if FULL else range(0, 64, 9)
CASES = 6 if FULL else 4
# The oracle computes 8-bit caches in float32, the kernel in bfloat16.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.03, "int8": 0.03, "float8_e4m3fn": 0.03}


def both(shape):
    kernel = functools.partial(pallas_gpu.attention, spec=shape.spec, interpret=True)
    return jax.jit(kernel), jax.jit(functools.partial(xla.ragged_paged_attention, spec=shape.spec))


@pytest.mark.parametrize("seed", SHAPES)
def test_any_mix_of_rows_equals_the_oracle(seed):
    shape = random_shape(seed)
    if shape.dtype != jnp.float32:  # XLA's CPU backend converts the whole cache at every gather
        shape = dataclasses.replace(shape, longest=min(shape.longest, 300))
    kernel, oracle = both(shape)
    for number in range(CASES):
        case = random_case(shape, 1000 * seed + number)
        got = np.asarray(kernel(case.q, case.pages, case.rows, sinks_KG=case.sinks))
        want = np.asarray(oracle(case.q, case.pages, case.rows, sinks_KG=case.sinks))
        error = np.abs(got - want).max(initial=0)
        print(f"{shape} case {number}: {error:.1e}")
        assert error <= TOLERANCE[jnp.dtype(shape.dtype).name], str(shape)


@pytest.mark.parametrize("page_size", [8, 64])
def test_decode_rows_split_their_keys_and_idle_rows_give_zeros(page_size):
    rng, longest, spec = np.random.default_rng(page_size), 2000, AttentionSpec(scale=0.125)
    width = -(-longest // page_size)
    pages = jnp.asarray(rng.standard_normal((4 * width + 1, 2, page_size, 2, 64), np.float32))
    table = jnp.asarray(1 + rng.permutation(4 * width).reshape(4, width), jnp.int32)
    q = jnp.asarray(rng.standard_normal((4, 2, 3, 64), np.float32))
    kernel = jax.jit(functools.partial(pallas_gpu.attention, spec=spec, interpret=True))
    for lengths in ([2000, 0, 1, 65], [64, 1999, 777, 0], [0, 0, 0, 0]):
        kv_len = jnp.asarray(lengths, jnp.int32)
        got = np.asarray(kernel(q, pages, SingleRows(kv_len, table)))
        want = np.asarray(xla.single_query_attention(q, pages, kv_len, table, spec=spec))
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)
        assert (got[np.array(lengths) == 0] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_heads_cut_over_devices_give_the_whole(dtype):
    shape = dataclasses.replace(random_shape(0, (dtype,)), kv_heads=4, longest=300)
    case = random_case(shape, 1)
    mesh = Mesh(np.array(jax.devices()[:4]), ("tp",), axis_types=(AxisType.Auto,))
    assert isinstance(case.pages, QuantizedPages) == is_quantized(dtype)
    kernel = functools.partial(pallas_gpu.attention, spec=shape.spec, interpret=True)
    heads, cached = PartitionSpec(None, "tp"), PartitionSpec(None, None, None, "tp")
    cut = jax.shard_map(
        lambda q, pages, rows: kernel(q, pages, rows),
        mesh=mesh,
        in_specs=(heads, cached, PartitionSpec()),
        out_specs=heads,
        check_vma=False,
    )
    whole = jax.jit(kernel)(case.q, case.pages, case.rows)
    np.testing.assert_allclose(jax.jit(cut)(case.q, case.pages, case.rows), whole, atol=2e-5, rtol=0)


def struct(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


LOWERED = {
    "llama": {},
    "smollm": {"k": 3, "g": 3, "h": 64},
    "float32": {"dtype": jnp.float32},
    "width-80-softcap": {"k": 4, "g": 1, "h": 80, "spec": {"softcap": 30.0}},
    "width-96-window": {"g": 4, "h": 96, "spec": {"window": 100}},
    "gemma": {"k": 4, "g": 2, "h": 256, "spec": {"softcap": 50.0, "window": 4096}},
    "int8": {"dtype": jnp.int8},
    "fp8": {"dtype": jnp.float8_e4m3fn},
    "deepseek": {"k": 1, "g": 128, "h": 576, "spec": {"value_width": 512}},
    "pages-of-64": {"page_size": 64},
}


def on_an_h100():
    """From JAX 0.11 on, lowering without a GPU wants to be told which one is meant."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("name", LOWERED)
def test_kernel_lowers_to_triton_for_cuda(name):
    """Triton refuses what interpretation hides: sizes that are no powers of two, products too small, types."""
    k, g, h, page_size, dtype, options = (
        LOWERED[name].get(key, default)
        for key, default in [("k", 8), ("g", 4), ("h", 128), ("page_size", 16), ("dtype", jnp.bfloat16), ("spec", {})]
    )
    halves = 1 if "value_width" in options else 2
    pages = struct(65, halves, page_size, k, h, dtype=dtype)
    if is_quantized(dtype):
        pages = QuantizedPages(pages, struct(*pages.shape[:-1], dtype=jnp.bfloat16))
    rows = RaggedRows(*(struct(*shape) for shape in [(8,), (8,), (8,), (), (8, 64)]))
    attend = functools.partial(pallas_gpu.attention, spec=AttentionSpec(scale=0.1, **options))
    q = struct(256, k, g, h, dtype=jnp.bfloat16)
    with on_an_h100():
        lowered = jax.jit(attend).trace(q, pages, rows).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 3  # single queries, their splits joined, and tiles
