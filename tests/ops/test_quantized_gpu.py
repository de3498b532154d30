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
from jaxllm.ops import quantized_gpu
from jaxllm.ops.quantized import QuantizedMatrix

SCHEMES = {
    "int4": Scheme(codes="uint4", group=64, offset=8, scale_dtype="bfloat16"),
    "q4_1": Scheme(codes="uint4", group=32, has_minima=True, scale_dtype="float16"),
    "int8": Scheme(codes="int8"),
    "q8_0": Scheme(codes="int8", group=32, scale_dtype="float16"),
    "fp8": Scheme(codes="float8_e4m3fn"),
}


def operands(scheme: Scheme, m: int, k: int, n: int, dtype="bfloat16"):
    rng = np.random.default_rng(m)
    codes = {"uint4": rng.integers(0, 256, (k // 2, n), np.uint8), "int8": rng.integers(-128, 128, (k, n), np.int8)}
    kept = codes.get(scheme.codes, rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn))
    scales, minima = (rng.random((k // (scheme.group or k), n)).astype(jnp.dtype(scheme.scale_dtype)) for _ in range(2))
    x = jnp.asarray(rng.standard_normal((m, k)), dtype)
    return x, jnp.asarray(kept), jnp.asarray(scales), jnp.asarray(minima) if scheme.has_minima else None


@pytest.mark.parametrize("name", SCHEMES)
def test_product_is_that_of_the_oracle(name):
    scheme = SCHEMES[name]
    for m, dtype in ((1, "bfloat16"), (20, "float32")):
        x, codes, scales, minima = operands(scheme, m, 384, 160, dtype)
        assert quantized_gpu.unsupported(m, 384, 160, scheme) is None
        kernel = functools.partial(quantized_gpu.quantized_matmul, scheme=scheme, interpret=True)
        got = np.asarray(jax.jit(kernel)(x, codes, scales, minima))
        exact = QuantizedMatrix(codes, scales, minima, None, None, scheme, 0, dtype="float32")
        want = np.asarray(exact.product("MK,KN->MN", x.astype(jnp.float32)))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


def test_a_gpu_that_holds_the_whole_matrix_multiplies_with_the_kernel(monkeypatch):
    """Traced as if there were one; interpreted in its branch's place."""
    seen, scheme = [], SCHEMES["int4"]
    x, codes, scales, _ = operands(scheme, 2, 128, 64)
    matrix = QuantizedMatrix(codes.reshape(64, 2, 32), scales.reshape(2, 2, 32), None, None, None, scheme, 0)
    want = np.asarray(matrix.product("TD,DXF->TXF", x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernel = functools.partial(quantized_gpu.quantized_matmul, interpret=True)
    monkeypatch.setattr(quantized_gpu, "quantized_matmul", lambda *a: seen.append(1) or kernel(*a))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *a, default, cuda=None, **_: (cuda or default)(*a))
    got = np.asarray(dataclasses.replace(matrix, is_alone=True).product("TD,DXF->TXF", x))
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max(), rtol=0)
    matrix.product("TD,DXF->TXF", x)  # held by several devices
    assert len(seen) == 1


def test_what_the_kernel_does_not_know_is_said():
    int4 = SCHEMES["int4"]
    assert quantized_gpu.unsupported(1, 4096, 4096, int4) is None
    assert "more than 256 rows" in str(quantized_gpu.unsupported(257, 4096, 4096, int4))
    assert "no numbers" in str(quantized_gpu.unsupported(1, 4096, 4096, Scheme(codes="uint4", group=32, table=E2M1)))
    small = Scheme(codes="uint4", group=16)
    assert "groups of less than 32" in str(quantized_gpu.unsupported(1, 4096, 4096, small))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("name", SCHEMES)
def test_kernel_lowers_to_triton_for_cuda(name, m):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    scheme, k, n = SCHEMES[name], 4096, 14336
    like = jax.eval_shape(lambda: operands_like(scheme, m, k, n))
    kernel = functools.partial(quantized_gpu.quantized_matmul, scheme=scheme)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        lowered = jax.jit(kernel).trace(*like).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 1


def operands_like(scheme: Scheme, m: int, k: int, n: int):
    kinds = {"uint4": jnp.uint8, "int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn}
    codes = jnp.zeros((k // 2 if scheme.bits == 4 else k, n), kinds[scheme.codes])
    scales = jnp.zeros((k // (scheme.group or k), n), scheme.scale_dtype)
    return jnp.zeros((m, k), jnp.bfloat16), codes, scales, scales if scheme.has_minima else None
