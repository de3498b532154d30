"""Packed products equal float64 ones of the same rounded numbers, row by row, whatever stands beside a row."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.ops.contraction import num_contracted
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.packed import PackedMatrix, pack, packed_product, packed_rows, packs

if reason := ffi.unavailable():
    pytest.skip(reason, allow_module_level=True)


def matrix(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16))


def packed(w: np.ndarray, contracted: tuple[int, ...]) -> PackedMatrix:
    kept = tuple(n for i, n in enumerate(w.shape) if i not in contracted)
    return PackedMatrix(jnp.asarray(pack(w, contracted)), kept)


product = jax.jit(packed_product, static_argnums=2)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "contracted", "spec"),
    [
        ((1, 64), (64, 32), (0,), "TD,DF->TF"),
        ((5, 96), (96, 2, 48), (0,), "TD,DXF->TXF"),
        ((13, 3, 2, 16), (3, 2, 16, 64), (0, 1, 2), "TKGH,KGHD->TD"),
        ((13, 1, 2, 16), (1, 2, 16, 64), (0, 1, 2), "TKGH,KGHD->TD"),
        ((32, 48), (160, 48), (1,), "RD,VD->RV"),
        ((100, 576), (576, 960), (0,), "TD,DF->TF"),
    ],
)
def test_product_equals_that_of_the_rounded_operands(x_shape, w_shape, contracted, spec):
    x, w = matrix(0, *x_shape).astype(np.float32) * 1.001, matrix(1, *w_shape)
    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)
    want = np.einsum(spec, rounded, w.astype(np.float64))
    got = np.asarray(product(jnp.asarray(x), packed(w, contracted), num_contracted(spec)))
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_row_does_not_depend_on_the_rows_beside_it():
    x, w = matrix(2, 40, 128), packed(matrix(3, 128, 96), (0,))
    whole = np.asarray(product(x, w))
    for first, end in ((0, 1), (7, 11), (3, 28), (12, 24)):
        assert np.array_equal(np.asarray(product(x[first:end], w)), whole[first:end])


def test_rows_of_a_table_come_out_as_they_went_in():
    table = matrix(4, 64, 20)
    index = np.array([63, 0, 31, 32, 5], np.int32)
    assert np.array_equal(np.asarray(packed_rows(packed(table, (1,)), index)), table[index])


def test_only_even_bfloat16_matrices_of_whole_panels_are_packed():
    assert packs((64, 2, 48), jnp.dtype(jnp.bfloat16), (0,))
    assert not packs((64, 2, 48), jnp.dtype(jnp.float32), (0,))
    assert not packs((63, 96), jnp.dtype(jnp.bfloat16), (0,))
    assert not packs((64, 50), jnp.dtype(jnp.bfloat16), (0,))
    assert not packs((64, 96), jnp.dtype(jnp.bfloat16), ())


def test_kernels_that_run_at_once_on_all_devices_do_not_wait_for_each_other():
    x, w = matrix(5, 24, 256), packed(matrix(6, 256, 512), (0,))
    want = np.asarray(product(x, w))

    def many(device: jax.Device) -> bool:
        here = jax.device_put((x, w), device)
        return all(np.array_equal(np.asarray(product(*here)), want) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, jax.devices()))


def test_engine_in_panels_gives_the_logprobs_of_the_engine_without(tiny_llama):
    prompts = [{"prompt_token_ids": np.random.default_rng(n).integers(0, 256, n).tolist()} for n in (3, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    seen = {}
    for backend in ("xla", "llvm"):
        llm = LLM(
            str(tiny_llama),
            dtype="bfloat16",
            matmul_backend=backend,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            kv_cache_memory_bytes=1 << 20,
        )
        assert llm.engine.runner.model.is_packed == (backend == "llvm")
        outputs = llm.generate(prompts, params)
        seen[backend] = [
            entry[token].logprob
            for output in outputs
            for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
    np.testing.assert_allclose(seen["llvm"], seen["xla"], atol=0.03, rtol=0)
    assert len(set(seen["llvm"])) > 30


def test_kernels_are_refused_where_they_cannot_run(tiny_llama, monkeypatch):
    with pytest.raises(ValueError, match="matmul_backend='llvm' is for one CPU device; use auto or xla"):
        LLM(str(tiny_llama), matmul_backend="llvm", mesh="tp=2")
    with pytest.raises(ValueError, match="matmul_backend='blas' is not supported; use one of auto, xla, llvm"):
        LLM(str(tiny_llama), matmul_backend="blas")
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    ffi.unavailable.cache_clear()
    try:
        with pytest.raises(ValueError, match="cannot run: llvmlite is not installed"):
            LLM(str(tiny_llama), matmul_backend="llvm")
        with pytest.raises(ValueError, match="cannot run: llvmlite is not installed"):
            LLM(str(tiny_llama), attention_backend="llvm")
    finally:
        ffi.unavailable.cache_clear()
