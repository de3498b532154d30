"""Every family gives the numbers of Hugging Face transformers, through the paged engine, on one device and on many."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import FAMILIES

MESHES = [(name, mesh) for name, tiny in FAMILIES.items() for mesh in ("tp=1", tiny.mesh)]


@pytest.mark.parametrize(("name", "mesh"), MESHES, ids=[f"{name}-{mesh}" for name, mesh in MESHES])
def test_logits_and_greedy_tokens_equal_transformers(name, mesh, tiny_model, load) -> None:
    reference = tiny_model(name)
    loaded = load(reference.folder, mesh)
    for prompt, expected in zip(reference.prompts, reference.logits, strict=True):
        np.testing.assert_allclose(loaded.logits(prompt), expected, atol=1e-3, rtol=0)
    assert loaded.generate(reference.prompts, len(reference.tokens[0])) == reference.tokens
