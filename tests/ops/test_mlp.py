"""Activations equal transformers' under each of its names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from jaxllm.families.hf_config import ACTIVATIONS
from jaxllm.ops.mlp import activate


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_that_of_transformers(name: str) -> None:
    x = np.random.default_rng(0).normal(0, 3, (64, 2, 32)).astype(np.float32)
    theirs = ACT2FN[name](torch.tensor(x[:, 0])).numpy()
    np.testing.assert_allclose(activate(x[:, :1], ACTIVATIONS[name]), theirs, atol=2e-6)
    np.testing.assert_allclose(activate(x, ACTIVATIONS[name]), theirs * x[:, 1], atol=2e-5)
