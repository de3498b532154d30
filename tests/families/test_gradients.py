"""Every parameter's derivative, of every family, equals torch's on the same model and text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import FAMILIES, VOCAB

from jaxllm.checkpoints import open_checkpoint
from jaxllm.families.registry import read_config
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import AbstractModel, abstract_model
from jaxllm.weights.loader import load_parameters
from tests.helpers.dense_attention import dense_context

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 14)


def torch_gradients(model: Any) -> Any:
    """A copy of the model whose parameters are the derivatives of the mean next-token loss."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    model.set_attn_implementation("eager")
    ids = torch.tensor(TOKENS)[None]
    logits = model(ids).logits[0, :-1].float()
    torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def zeroed(model: Any) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return model


def loaded(abstract: AbstractModel, model: Any, folder: Path) -> dict[Any, np.ndarray]:
    model.save_pretrained(folder)
    state = load_parameters(abstract, open_checkpoint(folder))
    return {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_gradient_equals_torchs(name, tiny_model, tmp_path):
    tiny = tiny_model(name)
    checkpoint = open_checkpoint(tiny.folder)
    placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
    abstract = abstract_model(read_config(checkpoint.config), placement, jnp.dtype(jnp.float32))
    state = load_parameters(abstract, checkpoint)

    @jax.jit
    @jax.grad
    def derivatives(state):
        model = nnx.merge(abstract.graph, state)
        logits = model.logits(
            model(jnp.asarray(TOKENS), jnp.arange(len(TOKENS)), dense_context(len(TOKENS))), lambda x, *_: x
        )
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), jnp.asarray(TOKENS)[1:, None], axis=1)
        return -jnp.mean(chosen)

    ours = {path: np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(derivatives(state))}
    # Where a family stores a parameter with an offset (norms of 1 + w), the offset belongs to no derivative.
    theirs = loaded(abstract, torch_gradients(tiny.model), tmp_path / "gradients")
    offsets = loaded(abstract, zeroed(tiny.model), tmp_path / "zeros")
    for path, got in ours.items():
        want = theirs[path] - offsets[path]
        scale = np.abs(want).max()
        assert np.abs(got - want).max() <= 1e-4 * max(scale, 1e-3), (path, scale, np.abs(got - want).max())
    assert np.abs(ours[("embedding",)]).max() > 0
