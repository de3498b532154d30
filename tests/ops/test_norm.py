"""The root-mean-square norm equals torch's, and a row knows nothing of the others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.ops.norm import rms_norm


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
def test_rms_norm_equals_torch(eps):
    rng = np.random.default_rng(0)
    x, scale = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 48), (48,)))
    expected = torch.nn.functional.rms_norm(torch.from_numpy(x), (48,), torch.from_numpy(scale), eps)
    np.testing.assert_allclose(np.asarray(rms_norm(x, scale, eps)), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("width", [64, 576, 131])
def test_row_of_a_norm_has_the_same_bits_among_any_number_of_rows(width):
    x = np.random.default_rng(0).standard_normal((64, width), np.float32)
    scale, norm = jnp.ones(width), jax.jit(lambda x, scale: rms_norm(x, scale, 1e-5))
    whole = np.asarray(norm(x, scale))
    want = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(whole, want, rtol=1e-5)
    if width != 131:  # too many odd terms to spell their order out
        assert all(np.array_equal(np.asarray(norm(x[:rows], scale)), whole[:rows]) for rows in (1, 2, 4, 8, 16, 32))
