"""The root-mean-square norm equals torch's."""

from __future__ import annotations

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
