"""Every kind of rotary scaling that transformers has, in every family that may carry it: frequencies and magnitude."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES

from jaxllm.config import ModelConfig
from jaxllm.families import read_config
from jaxllm.ops.rope import inverse_frequencies, rope_tables

MAX_POSITIONS = 128
LENGTHS = (20, 100, 300)  # within the original length, beyond it, beyond all positions
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn-plain": {"factor": 4.0, "original_max_position_embeddings": 32, "truncate": False, "attention_factor": 0.9},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.5},
    "longrope": {"original_max_position_embeddings": 32},
    "longrope-factor": {"original_max_position_embeddings": 32, "factor": 6.0},
    "longrope-magnitude": {"original_max_position_embeddings": 32, "attention_factor": 1.3},
}
ONLY = {"phi3": ("default", "longrope")}  # by transformers' own validation
ROTARY = {name: tiny for name, tiny in FAMILIES.items() if tiny.config != "GPT2Config" and not name.startswith("phi3_")}
CASES = [(name, kind) for name in ROTARY for kind in KINDS if kind.split("-")[0] in ONLY.get(name, tuple(KINDS))]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_frequencies_equal_transformers(name: str, kind: str) -> None:
    theirs, cfg = both(name, kind)
    layers = theirs.config.layer_types if hasattr(theirs, "full_attention_inv_freq") else None
    for layer, length in itertools.product(range(cfg.num_layers), LENGTHS):
        if (rope := cfg.rope(layer)) is None:
            continue
        prefix, extra = (f"{layers[layer]}_", (layers[layer],)) if layers else ("", ())
        theirs(torch.zeros(1), torch.arange(length)[None], *extra)
        expected = getattr(theirs, f"{prefix}inv_freq").numpy()
        np.testing.assert_allclose(inverse_frequencies(rope, length), expected, rtol=2e-6)
        cos, _ = rope_tables(np.zeros(1, np.int32), rope, length)
        assert float(cos[0, 0]) == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"), rel=1e-6)


@pytest.mark.parametrize("name", ROTARY)
def test_what_depends_on_the_length_is_said_by_the_configuration(name: str) -> None:
    for kind in ("default", "longrope", "dynamic"):
        if (name, kind) in CASES:
            assert (both(name, kind)[1].length_scaling is not None) == (kind != "default")


def both(name: str, kind: str) -> tuple[Any, ModelConfig]:
    """transformers' rotary embedding of the family's tiny model with this kind of scaling, and our configuration."""
    config = FAMILIES[name].hf_config()
    parameters = {"rope_type": kind.split("-")[0], "rope_theta": 5000.0, **KINDS[kind]}
    dim = getattr(config, "qk_rope_head_dim", None) or config.head_dim if hasattr(config, "head_dim") else None
    dim = dim or config.hidden_size // config.num_attention_heads
    nested = "full_attention" in config.rope_parameters
    if not nested and (partial := config.rope_parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        parameters["partial_rotary_factor"], dim = partial, int(dim * partial)
    if kind.startswith("longrope"):
        parameters["short_factor"] = np.linspace(1.0, 2.0, dim // 2).tolist()
        parameters["long_factor"] = np.linspace(1.5, 8.0, dim // 2).tolist()
    if nested:
        parameters = {**config.rope_parameters, "full_attention": parameters}
    kwargs = {**FAMILIES[name].kwargs, "rope_parameters": parameters, "max_position_embeddings": MAX_POSITIONS}
    if name == "mixtral":
        kwargs["head_dim"] = 16  # transformers does not compute it for these kinds
    if name == "phi3":
        kwargs["original_max_position_embeddings"] = 32
    config = type(FAMILIES[name])(FAMILIES[name].config, kwargs).hf_config()
    config.architectures = [FAMILIES[name].architecture]
    module = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    rotary = next(v for k, v in vars(module).items() if k.endswith("RotaryEmbedding"))
    return rotary(config), read_config(config.to_dict())
