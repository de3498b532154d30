"""Rotary embeddings equal transformers', with and without Llama 3.1 scaling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxllm.config import Rope, RopeScaling
from jaxllm.ops.rope import apply_rope, inverse_frequencies, rope_tables

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
CASES = [
    pytest.param(32, 10000.0, None, id="plain"),
    pytest.param(16, 500000.0, None, id="other-theta-and-width"),
    pytest.param(64, 10000.0, LLAMA3, id="llama3"),
]


def theirs(head_dim: int, theta: float, scaling: dict | None) -> LlamaRotaryEmbedding:
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            head_dim=head_dim,
            max_position_embeddings=4096,
            rope_parameters=parameters,
        )
    )


def rope(head_dim: int, theta: float, scaling: dict | None) -> Rope:
    if scaling is None:
        return Rope(dim=head_dim, theta=theta, scaling=None)
    llama3 = RopeScaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_position=scaling["original_max_position_embeddings"],
    )
    return Rope(dim=head_dim, theta=theta, scaling=llama3)


def ours(head_dim: int, theta: float, scaling: dict | None) -> np.ndarray:
    return inverse_frequencies(rope(head_dim, theta, scaling), 4096)


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), CASES)
def test_frequencies_equal_transformers(head_dim, theta, scaling):
    np.testing.assert_allclose(
        ours(head_dim, theta, scaling), theirs(head_dim, theta, scaling).inv_freq.numpy(), rtol=1e-6
    )


def test_llama3_scaling_keeps_the_fast_and_stretches_the_slow_frequencies():
    plain, scaled = ours(64, 10000.0, None), ours(64, 10000.0, LLAMA3)
    ratio = plain / scaled
    assert ratio[0] == pytest.approx(1.0)
    assert ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.01) & (ratio < 7.99)).any(), "no frequency is blended"


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), CASES)
def test_rotation_equals_transformers_at_any_position(head_dim, theta, scaling):
    rng = np.random.default_rng(0)
    positions = np.array([0, 1, 2, 100, 1023, 7], np.int32)
    q = rng.standard_normal((6, 4, head_dim)).astype(np.float32)
    cos, sin = theirs(head_dim, theta, scaling)(torch.zeros(1), torch.from_numpy(positions)[None].long())
    heads_first = torch.from_numpy(q).permute(1, 0, 2)[None]
    expected, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    out = apply_rope(q, rope_tables(positions, rope(head_dim, theta, scaling), 4096))
    np.testing.assert_allclose(out, expected[0].permute(1, 0, 2).numpy(), atol=3e-4, rtol=0)
