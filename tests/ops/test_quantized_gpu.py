"""The GPU kernel of quantised products, interpreted, equals XLA's product, and lowers to Triton for CUDA."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.config.quantization import E2M1, Scheme
from jaxllm.ops import quantized_columns, quantized_gpu
from jaxllm.ops.quantized import QuantizedMatrix
from jaxllm.ops.quantized_columns import lay_columns
from jaxllm.sharding.mesh import make_mesh
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.quantized_columns import QuantizedInColumns
from jaxllm.weights.stored import choose_storage

SCHEMES = {
    "int4": Scheme(codes="uint4", group=64, offset=8, scale_dtype="bfloat16"),
    "q4_1": Scheme(codes="uint4", group=32, has_minima=True, scale_dtype="float16"),
    "int8": Scheme(codes="int8"),
    "q8_0": Scheme(codes="int8", group=32, scale_dtype="float16"),
    "fp8": Scheme(codes="float8_e4m3fn"),
}


def logical(scheme: Scheme, k: int, kept: tuple[int, ...], dtype: str = "bfloat16") -> QuantizedMatrix:
    """A random matrix whose inputs are its first dim."""
    rng = np.random.default_rng(k)
    pairs, bytes_ = rng.integers(0, 256, (k // 2, *kept), np.uint8), rng.integers(-128, 128, (k, *kept), np.int8)
    codes = {"uint4": pairs, "int8": bytes_}
    codes = codes.get(scheme.codes, rng.standard_normal((k, *kept)).astype(ml_dtypes.float8_e4m3fn))
    groups = (k // (scheme.group or k), *kept)
    scales, minima = (jnp.asarray(rng.random(groups).astype(jnp.dtype(scheme.scale_dtype))) for _ in range(2))
    minima = minima if scheme.has_minima else None
    return QuantizedMatrix(jnp.asarray(codes), scales, minima, None, None, scheme, 0, dtype=dtype)


def rows(m: int, k: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(m).standard_normal((m, k)), dtype)


@pytest.mark.parametrize("name", SCHEMES)
def test_product_is_that_of_the_oracle(name):
    scheme = SCHEMES[name]
    matrix = logical(scheme, 384, (160,), "float32")
    laid = lay_columns(matrix)
    assert quantized_gpu.unsupported(384, 160, scheme) is None
    for m, dtype in ((1, "bfloat16"), (20, "float32"), (40, "bfloat16")):
        x = rows(m, 384, dtype)
        kernel = functools.partial(quantized_gpu.quantized_matmul, scheme=scheme, interpret=True)
        got = np.asarray(jax.jit(kernel)(x, laid.codes, laid.scales, laid.minima))
        want = np.asarray(matrix.product("MK,KN->MN", x.astype(jnp.float32)))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_many_rows_are_multiplied_a_block_at_a_time(name, monkeypatch):
    monkeypatch.setattr(quantized_columns, "_BLOCK", 128 * 64)
    matrix = logical(SCHEMES[name], 384, (2, 32), "float32")
    matrix = dataclasses.replace(matrix, order=jnp.asarray(np.random.default_rng(0).permutation(384), jnp.int32))
    x = rows(300, 384, "float32").reshape(3, 100, 384)
    want = np.asarray(matrix.product("ATD,DXF->ATXF", x))
    laid = lay_columns(matrix)
    assert laid.shape == (384, 2, 32)
    np.testing.assert_allclose(
        np.asarray(laid.product("ATD,DXF->ATXF", x)), want, atol=2e-5 * np.abs(want).max(), rtol=0
    )


def test_one_gpu_keeps_columns_together_and_multiplies_few_rows_with_the_kernel(monkeypatch):
    """Traced as if there were one; interpreted in its branch's place."""
    seen, scheme = [], SCHEMES["int4"]
    want = jax.ShapeDtypeStruct((2, 64, 96), jnp.bfloat16)
    storage = choose_storage(want, (0, 1), matmul="pallas_gpu", scheme=scheme, inputs=(0, 1))
    assert isinstance(storage, QuantizedInColumns)
    array = jax.random.normal(jax.random.key(0), want.shape, want.dtype)
    sharding = jax.sharding.NamedSharding(make_mesh("tp=1"), jax.sharding.PartitionSpec())
    laid = storage.from_array(array, sharding)
    like = storage.abstract(want, sharding)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), laid) == jax.tree.map(lambda a: (a.shape, a.dtype), like)
    exact = storage.logical.from_array(array, sharding)
    kernel = functools.partial(quantized_gpu.quantized_matmul, interpret=True)
    monkeypatch.setattr(quantized_gpu, "quantized_matmul", lambda *a: seen.append(1) or kernel(*a))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, cuda=None, **_: (cuda or default)(*a))
    for tokens in (3, 300):
        x = rows(tokens, 128).reshape(tokens, 2, 64)
        got, right = (np.asarray(m.product("TGH,GHD->TD", x)) for m in (laid, exact))
        np.testing.assert_allclose(got, right, atol=0.01 * np.abs(right).max(), rtol=0)
    assert len(seen) == 1
    table = choose_storage(want, (), matmul="pallas_gpu", scheme=scheme, inputs=(0, 1))
    assert isinstance(table, Quantized)  # multiplied along other dims too
    by_xla = choose_storage(want, (0, 1), matmul="xla", scheme=scheme, inputs=(0, 1))
    assert isinstance(by_xla, Quantized)


def test_what_the_kernel_does_not_know_is_said():
    assert quantized_gpu.unsupported(4096, 4096, SCHEMES["int4"]) is None
    assert "no numbers" in str(quantized_gpu.unsupported(4096, 4096, Scheme(codes="uint4", group=32, table=E2M1)))
    small = Scheme(codes="uint4", group=16)
    assert "groups of less than 32" in str(quantized_gpu.unsupported(4096, 4096, small))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("name", SCHEMES)
def test_kernel_lowers_to_triton_for_cuda(name, m):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    scheme, k, n = SCHEMES[name], 512, 256
    x, laid = jax.eval_shape(lambda: (rows(m, k), lay_columns(logical(scheme, k, (n,)))))
    kernel = functools.partial(quantized_gpu.quantized_matmul, scheme=scheme)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(kernel).trace(x, laid.codes, laid.scales, laid.minima).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 1
