"""Adapters that PEFT made give PEFT's numbers in every family, and what is written here gives them in PEFT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxllm.adapters.panels import LowRankPanels
from jaxllm.adapters.peft import LoraConfig, read_peft, write_peft
from jaxllm.adapters.product import LowRank, adapted_product, adapter_arrays, slotted_product
from jaxllm.adapters.slots import as_in_slots, laid_anew
from jaxllm.adapters.targets import Target, targets_of
from jaxllm.checkpoints import open_checkpoint
from jaxllm.families.registry import family_of, read_config
from jaxllm.ops.cpu import ffi
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import abstract_model
from jaxllm.weights.loader import load_parameters
from tests.families.tiny import FAMILIES, save_tiny
from tests.helpers.dense_attention import dense_context
from tests.helpers.peft_models import add_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
TOKENS = np.random.default_rng(1).integers(3, 96, 20)
# Fused matrices, biases and copies; latent attention with a shared expert; matrices the other way round.
CHOSEN = ("llama", "phi3", "gpt2", "deepseek_v3", "qwen2_moe")
ATTENTION = "q_proj k_proj v_proj o_proj q_a_proj q_b_proj kv_a_proj_with_mqa".split()
SHARED = [f"shared_expert{s}.{kind}_proj" for s in ("", "s") for kind in ("gate", "up", "down")]  # not the routed ones


@dataclasses.dataclass
class Decoder:
    """A tiny model here, with its targets."""

    model: Any
    params: Any
    targets: dict[str, Target]

    def logits(self, product: Any) -> np.ndarray:
        from flax import nnx

        @jax.jit
        def run(params: Any) -> Any:
            decoder = nnx.merge(self.model.graph, params)
            context = dataclasses.replace(dense_context(), product=product)
            hidden = decoder(jnp.array(TOKENS), jnp.arange(len(TOKENS)), context)
            return decoder.logits(hidden, lambda x, *dims: x)

        return np.asarray(run(self.params))


def decoder_of(folder: Path) -> Decoder:
    from flax import nnx

    checkpoint = open_checkpoint(folder)
    cfg = read_config(checkpoint.config)
    model = abstract_model(cfg, Placement(make_mesh("tp=1"), load_rules("replicated")), jnp.dtype("float32"))
    sources = family_of(checkpoint.config).weight_map(cfg, 1)
    targets = targets_of(sources, dict(nnx.to_flat_state(model.state)))
    return Decoder(model, load_parameters(model, checkpoint), targets)


def arrays(decoder: Decoder, folder: Path, rank: int) -> dict[str, LowRank]:
    return adapter_arrays(decoder.targets, read_peft(folder), rank)


@pytest.mark.parametrize("name", CHOSEN)
def test_logits_equal_pefts(name, tmp_path):
    base = save_tiny(name, tmp_path / "base")
    experts = {"qwen2_moe": ATTENTION + SHARED, "deepseek_v3": ATTENTION}  # PEFT takes names like these for the routed
    only = {"target_modules": experts[name]} if name in experts else {}
    wrapped = add_adapter(base, tmp_path / "adapter", rank=3, use_rslora=name == "llama", **only)
    with torch.no_grad():
        expected = wrapped(torch.tensor(TOKENS)[None]).logits[0].numpy()
        with wrapped.disable_adapter():
            plain = wrapped(torch.tensor(TOKENS)[None]).logits[0].numpy()
    assert np.abs(expected - plain).max() > 0.1  # the adapter matters
    decoder = decoder_of(tmp_path / "base")
    adapter = arrays(decoder, tmp_path / "adapter", 4)
    np.testing.assert_allclose(decoder.logits(adapted_product(adapter)), expected, atol=1e-4, rtol=1e-4)

    slots = {
        name: LowRank(jnp.stack([0 * m.a + 7, m.a]), jnp.stack([0 * m.b + 7, m.b]), m.stacked, m.module_of)
        for name, m in adapter.items()
    }
    of_slots = decoder.logits(slotted_product(slots, jnp.full(len(TOKENS), 2)))
    np.testing.assert_allclose(of_slots, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(
        decoder.logits(slotted_product(slots, jnp.zeros(len(TOKENS), jnp.int32))), plain, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ("llama", "gpt2", "deepseek_v3"))
def test_peft_loads_what_is_written_here_with_the_same_logits(name, tmp_path):
    base = save_tiny(name, tmp_path / "base")
    decoder = decoder_of(tmp_path / "base")
    rng = np.random.default_rng(0)
    matrices, modules = {}, {}
    for target in decoder.targets.values():
        if name == "deepseek_v3" and "attention" not in target.name:
            continue
        a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in target.shapes(4))
        matrices[target.name] = LowRank.of(target, jnp.array(a), jnp.array(b))
        modules |= target.to_modules(a, b)
    config = LoraConfig(r=4, lora_alpha=6.0)
    write_peft(tmp_path / "ours", modules, config)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = wrapped(torch.tensor(TOKENS)[None]).logits[0].numpy()
    got = decoder.logits(adapted_product(matrices, config.scale))
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)
    again = arrays(decoder, tmp_path / "ours", 4)
    np.testing.assert_allclose(decoder.logits(adapted_product(again)), expected, atol=1e-4, rtol=1e-4)


def test_every_family_has_targets_whose_matrices_come_back_as_they_were(tmp_path):
    """Also where heads are copied over the mesh."""
    from flax import nnx

    rng = np.random.default_rng(0)
    for name, tiny in FAMILIES.items():
        hf = tiny.hf_config().to_dict() | {"architectures": [tiny.architecture]}
        cfg = read_config(hf)
        placement = Placement(make_mesh(tiny.mesh), load_rules("megatron"))
        model = abstract_model(cfg, placement, jnp.dtype("float32"))
        sources = family_of(hf).weight_map(cfg, model.kv_copies)
        targets = targets_of(sources, dict(nnx.to_flat_state(model.state)))
        assert len(targets) >= 3 * cfg.num_layers - 2, name
        for target in targets.values():
            given = {}
            for module in target.modules:
                size_in, size_out = target.sizes(module)
                given[module] = (rng.normal(size=(3, size_in)), rng.normal(size=(size_out, 3)))
            a, b = target.from_modules(given, 3, np.float64)
            assert (a.shape, b.shape) == target.shapes(3)
            for module, (a_back, b_back) in target.to_modules(a, b).items():
                np.testing.assert_array_equal(a_back, given[module][0])
                np.testing.assert_array_equal(b_back, given[module][1])


@pytest.mark.skipif(bool(ffi.unavailable()), reason="the processor has no kernels for bfloat16")
def test_arrays_change_their_form_from_mesh_to_mesh(folders):
    """From the panels of one CPU to the matrices of a mesh, and back."""
    from flax import nnx

    checkpoint = open_checkpoint(folders.base)
    cfg = read_config(checkpoint.config)
    model = abstract_model(cfg, Placement(make_mesh("tp=1"), load_rules("replicated")), jnp.dtype("bfloat16"))
    sources, state = family_of(checkpoint.config).weight_map(cfg, 1), dict(nnx.to_flat_state(model.state))
    here, there = (targets_of(sources, state, in_panels=in_panels) for in_panels in (True, False))
    given = adapter_arrays(here, read_peft(folders.adapters[0]), 4)
    kept = as_in_slots(here, given)
    assert {type(matrices) for matrices in kept.values()} == {LowRank, LowRankPanels}  # some panels have two modules
    moved = laid_anew(kept, here, there)
    for name, matrices in given.items():
        np.testing.assert_array_equal(moved[name].a, matrices.a)
        np.testing.assert_array_equal(moved[name].b, matrices.b)
    jax.tree.map(np.testing.assert_array_equal, laid_anew(moved, there, here), kept)
