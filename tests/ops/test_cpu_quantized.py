"""Products with quantised panels equal float64 ones of the exact weights, row by row, whatever stands beside a row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.quantized import QuantizedPanels, pack_codes, pack_scales, packs_quantized
from jaxllm.ops.cpu.quantized_numbers import Codes

if reason := ffi.unavailable():
    pytest.skip(reason, allow_module_level=True)

UINT4 = Codes(4, tuple(map(float, range(16))))
INT4 = Codes(4, tuple(map(float, range(-8, 8))))
E2M1 = Codes(4, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
INT8 = Codes(8)
product = jax.jit(lambda x, w: w.product("TD,DF->TF", x))


def matrix(
    meaning: Codes, k: int, n: int, group: int, *, axis=0, minima=False, scale="float16", dtype="bfloat16", seed=0
) -> tuple[QuantizedPanels, np.ndarray]:
    """Panels, and the weights `[K, N]` in float64."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (k, n), np.uint8) if meaning.bits == 4 else rng.integers(-128, 128, (k, n), np.int8)
    factors = [(rng.standard_normal((k // group, n)) * 0.05).astype(jnp.dtype(scale)) for _ in range(1 + minima)]
    numbers = np.array(meaning.table)[codes] if meaning.bits == 4 else codes.astype(np.float64)
    wide = [np.repeat(factor.astype(np.float64), group, axis=0) for factor in factors]
    dense = numbers * wide[0] + (wide[1] if minima else 0.0)
    turned = codes if axis == 0 else np.ascontiguousarray(codes.T)
    packed = [pack_scales(factor if axis == 0 else factor.T, axis) for factor in factors]
    panels = QuantizedPanels(
        jnp.asarray(pack_codes(turned, meaning, axis)),
        jnp.asarray(packed[0]),
        jnp.asarray(packed[1]) if minima else None,
        None,
        None,
        meaning,
        (n,),
        dtype,
    )
    return panels, dense


def inputs(m: int, k: int, dtype="bfloat16") -> jax.Array:
    return jax.random.normal(jax.random.key(m), (m, k), jnp.float32).astype(dtype)


def check(panels: QuantizedPanels, dense: np.ndarray, x: jax.Array) -> None:
    want = np.asarray(x).astype(np.float64) @ dense
    got = np.asarray(product(x, panels))
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("meaning", [UINT4, INT4, E2M1, INT8], ids=["uint4", "int4", "e2m1", "int8"])
@pytest.mark.parametrize("m", [1, 5, 13])
def test_product_is_that_of_the_exact_weights(meaning, m, dtype):
    panels, dense = matrix(meaning, 96, 64, 32, minima=True, dtype=dtype)
    check(panels, dense, inputs(m, 96, dtype))


@pytest.mark.parametrize("scale", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("group", "k"), [(16, 48), (32, 96), (64, 192), (128, 256), (80, 80)])
def test_every_group_and_type_of_scale(group, k, scale):
    panels, dense = matrix(INT8 if group == 16 else INT4, k, 32, group, scale=scale, minima=scale == "float32")
    check(panels, dense, inputs(3, k))


def test_processor_without_wide_registers_multiplies_too(monkeypatch):
    monkeypatch.setattr(ffi, "unavailable", lambda: "this processor has no avx512bf16 instructions")
    monkeypatch.setattr(ffi, "host", lambda: ("haswell", "+avx2,+fma,+f16c"))
    for meaning in (UINT4, E2M1, INT8):
        for m in (1, 7):
            panels, dense = matrix(meaning, 96, 32, 32, minima=True)
            check(panels, dense, inputs(m, 96))


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("rounding", ["group", "token"])
@pytest.mark.parametrize("meaning", [UINT4, INT4, INT8], ids=["uint4", "int4", "int8"])
def test_product_with_rounded_rows_is_that_of_what_they_round_to(meaning, rounding, is_wide, monkeypatch):
    if not is_wide:
        monkeypatch.setattr(ffi, "has", lambda feature: False)
        monkeypatch.setattr(ffi, "host", lambda: ("haswell", "+avx2,+fma,+f16c"))
    panels, dense = matrix(meaning, 96, 64, 32, minima=True)
    panels = dataclasses.replace(panels, rounding=rounding)
    for m in (1, 13, 40):
        x = np.asarray(inputs(m, 96, "float32"))
        parts = x.reshape(m, -1, 32 if rounding == "group" else 96)
        scales = np.abs(parts).max(axis=2, keepdims=True) / np.float32(127)
        want = (np.round(parts / scales) * scales.astype(np.float64)).reshape(m, 96) @ dense
        got = np.asarray(product(jnp.asarray(x), panels))
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)


def test_row_does_not_depend_on_the_rows_beside_it():
    for meaning, rounding in ((UINT4, "never"), (INT8, "never"), (UINT4, "group")):
        panels, _ = matrix(meaning, 128, 96, 32, minima=True)
        panels = dataclasses.replace(panels, rounding=rounding)
        x = inputs(40, 128)
        whole = np.asarray(product(x, panels))
        for first, end in ((0, 1), (7, 11), (3, 28), (12, 24)):
            assert np.array_equal(np.asarray(product(x[first:end], panels)), whole[first:end])


def test_rows_of_a_table_are_its_weights():
    for meaning in (UINT4, INT8):
        panels, dense = matrix(meaning, 64, 96, 32, axis=1, minima=True, dtype="float32")
        index = np.array([63, 0, 31, 32, 95], np.int32)
        np.testing.assert_allclose(np.asarray(panels.rows(index)), dense.T[index], rtol=1e-6, atol=1e-6)
        check(panels, dense, inputs(2, 64, "float32"))


def test_experts_are_read_where_they_lie():
    each = [matrix(UINT4, 64, 64, 32, minima=True, seed=seed) for seed in range(3)]
    experts = jax.tree.map(lambda *parts: jnp.stack(parts), *(panels for panels, _ in each))
    assert experts.shape == (3, 64, 64)
    chosen = jax.jit(lambda x, w, number: w.expert(number).product("TD,DF->TF", x))
    for number, (panels, _) in enumerate(each):
        x = inputs(4, 64)
        assert np.array_equal(np.asarray(chosen(x, experts, number)), np.asarray(product(x, panels)))


def test_inputs_in_another_order():
    panels, _ = matrix(INT4, 64, 32, 32)
    order = np.random.default_rng(3).permutation(64)
    x = inputs(2, 64)
    want = np.asarray(product(x[:, order], panels))
    got = np.asarray(product(x, dataclasses.replace(panels, order=jnp.asarray(order, jnp.int32))))
    assert np.array_equal(got, want)


def test_only_whole_panels_and_groups_are_packed():
    assert packs_quantized(96, 64, 32, INT4)
    assert not packs_quantized(96, 48, 32, INT4)
    assert not packs_quantized(96, 64, 24, INT4)
    assert not packs_quantized(100, 64, 100, INT8)
    assert not packs_quantized(96, 64, 32, Codes(4, (0.1,) * 16))
