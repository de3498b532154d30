"""Every family gives the numbers of Hugging Face transformers, through the paged engine, on one device and on many.

On many by default only those with something of their own to cut; with JAXLLM_FULL_TESTS=1 all.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from tiny import FAMILIES

# Copied heads and their biases, soft-caps, fused matrices, norms over all heads, positions, latent rows.
CUT = tuple(FAMILIES) if os.environ.get("JAXLLM_FULL_TESTS") else ("qwen2", "phi3", "olmo2", "gpt2", "deepseek_v3")
MESHES = [(name, mesh) for name, tiny in FAMILIES.items() for mesh in ("tp=1", tiny.mesh)[: 1 + (name in CUT)]]


@pytest.mark.parametrize(("name", "mesh"), MESHES, ids=[f"{name}-{mesh}" for name, mesh in MESHES])
def test_logits_and_greedy_tokens_equal_transformers(name, mesh, tiny_model, load) -> None:
    reference = tiny_model(name)
    loaded = load(reference.folder, mesh)
    for prompt, expected in zip(reference.prompts, reference.logits, strict=True):
        np.testing.assert_allclose(loaded.logits(prompt), expected, atol=1e-3, rtol=0)
    assert loaded.generate(reference.prompts, len(reference.tokens[0])) == reference.tokens
