"""GPTQ: the codes are those of the method's own formula, and they leave less of a layer's error than rounding does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxllm.config.quantization import Scheme
from jaxllm.weights import gptq
from jaxllm.weights.rounding import numbers_of, round_to_nearest
from jaxllm.weights.schemes import FP8, INT8, int4


def layer(n: int, k: int, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Weights `[N, K]`, and the Hessian of inputs that hang together."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((k, k)) * np.linspace(0.1, 2.0, k)
    inputs = (rng.standard_normal((rows, k)) @ mixing).astype(np.float32)
    return rng.standard_normal((n, k)).astype(np.float32), inputs.T @ inputs


def values(pieces, scheme: Scheme) -> np.ndarray:
    group = pieces.codes.shape[1] // pieces.scales.shape[1]
    return numbers_of(pieces.codes, scheme) * np.repeat(pieces.scales, group, axis=1)


def error(weights: np.ndarray, hessian: np.ndarray, made: np.ndarray) -> float:
    off = (weights - made).astype(np.float64)
    return float(np.einsum("nk,kl,nl->", off, hessian, off))


@pytest.mark.parametrize("scheme", [int4(32), int4(96), INT8, FP8], ids=lambda s: s.name)
def test_error_on_the_inputs_is_less_than_that_of_rounding_to_nearest(scheme: Scheme) -> None:
    weights, hessian = layer(48, 192)
    rounded = error(weights, hessian, values(round_to_nearest(weights, scheme, 1), scheme))
    calibrated = error(weights, hessian, values(gptq.rounding_for(hessian, scheme)(weights), scheme))
    assert 0 < calibrated < 0.75 * rounded


def test_codes_are_those_of_one_column_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle eliminates each column from the inverse Hessian itself, in float64 (optimal brain surgeon)."""
    monkeypatch.setattr(gptq, "_SHRINKING", np.ones(1, np.float32))
    scheme = dataclasses.replace(int4(64), scale_dtype="float32")
    weights, hessian = layer(16, 320)
    got = gptq.rounding_for(hessian, scheme)(weights)
    w, h = weights.astype(np.float64), hessian.astype(np.float64)
    inverse = np.linalg.inv(h + 0.01 * np.diag(h).mean() * np.eye(320))
    expected = np.empty((16, 320), np.uint8)
    for j in range(320):
        if j % 64 == 0:
            scale = np.abs(w[:, j : j + 64]).max(axis=1) / 7
        code = np.clip(np.round(w[:, j] / scale), -8, 7)
        expected[:, j] = code + 8
        off = (w[:, j] - code * scale) / inverse[j, j]
        w -= off[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert (got.codes == expected).mean() > 0.998  # of ties that fall to the other side in float32


def test_inputs_that_never_came_change_nothing() -> None:
    weights, hessian = layer(8, 64)
    hessian[:, 5] = hessian[5] = 0
    assert np.isfinite(values(gptq.rounding_for(hessian, int4(32))(weights), int4(32))).all()
    nothing = gptq.rounding_for(np.zeros((64, 64), np.float32), int4(32))(weights)
    np.testing.assert_array_equal(nothing.codes, round_to_nearest(weights, int4(32), 1).codes)
