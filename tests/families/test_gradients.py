"""Loss and every derivative, of every family, equal torch's: two packed documents, and two passes of torch's."""

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
from jaxllm.training.data.batches import Packed
from jaxllm.training.data.documents import next_token_document
from jaxllm.training.loss import LossModel, name_of
from jaxllm.weights.abstract import AbstractModel, abstract_model
from jaxllm.weights.loader import load_parameters

TOKENS = np.random.default_rng(3).integers(3, VOCAB, 14)
DOCUMENTS = (slice(0, 9), slice(9, 14))
SPAN = 16  # two tokens of it are padding


def torch_gradients(model: Any) -> tuple[float, Any]:
    """The summed next-token loss of both documents, and a copy of the model whose parameters are its derivatives."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    model.set_attn_implementation("eager")
    total = 0.0
    for document in DOCUMENTS:
        ids = torch.tensor(TOKENS[document])[None]
        logits = model(ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss.backward()
        total += float(loss.detach())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for buffer in model.buffers():
            buffer.zero_()
    return total, model


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
def test_loss_and_every_gradient_equal_torchs(name, tiny_model, tmp_path):
    tiny = tiny_model(name)
    checkpoint = open_checkpoint(tiny.folder)
    placement = Placement(make_mesh("tp=1"), load_rules("megatron"))
    abstract = abstract_model(read_config(checkpoint.config), placement, jnp.dtype(jnp.float32))
    state = dict(nnx.to_flat_state(load_parameters(abstract, checkpoint)))
    documents = [
        next_token_document("here", TOKENS[some].tolist(), [True] * (some.stop - some.start)) for some in DOCUMENTS
    ]
    (batch,) = Packed(documents, spans=1, span=SPAN, seed=0).held_out()
    model = LossModel(abstract, SPAN)
    values = {name_of(path): leaf.get_value() for path, leaf in state.items()}
    loss, derivatives = jax.jit(jax.value_and_grad(lambda values: model.sums(values, batch).loss))(values)

    ours = {path: np.asarray(derivatives[name_of(path)]) for path in state}
    want_loss, gradients = torch_gradients(tiny.model)
    assert abs(float(loss) - want_loss) <= 1e-4 * want_loss
    # Where a family stores a parameter with an offset (norms of 1 + w), the offset belongs to no derivative.
    theirs = loaded(abstract, gradients, tmp_path / "gradients")
    offsets = loaded(abstract, zeroed(tiny.model), tmp_path / "zeros")
    for path, got in ours.items():
        want = theirs[path] - offsets[path]
        scale = np.abs(want).max()
        assert np.abs(got - want).max() <= 1e-4 * max(scale, 1e-2), (path, scale, np.abs(got - want).max())
    assert np.abs(ours["embedding",]).max() > 0
