"""What each rule file promises, in the program for a TPU: compiled ahead of time, on any machine.

The CPU backend has no reduce-scatter (it shows as an all-reduce and a slice), so this is where it is counted.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.config import EngineConfig
from jaxllm.deployment.collectives import count_collectives
from jaxllm.deployment.program_text import KINDS

pytestmark = pytest.mark.optimized

if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu (the plan extra)", allow_module_level=True)

LAYERS, TOKENS = 2, (64, 128)
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
NONE = dict.fromkeys(KINDS, 0)
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
ROUTED = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
}


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Counts of one ragged step for four TPU v5e chips."""
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask about
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run, so nothing is shared
        devices = list(topologies.get_topology_desc("v5e:2x2", "tpu").devices)

    @functools.cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        save_file({"none": np.zeros(1)}, path / "model.safetensors")  # only shapes are wanted
        (path / "config.json").write_text(json.dumps(ROUTED if kind == "routed" else DENSE), encoding="utf-8")
        return path

    @functools.cache
    def run(kind: str, mesh: str, rules: str, tokens: int) -> dict:
        config = EngineConfig(model=str(folder(kind)), mesh=mesh, sharding_rules=rules)
        return count_collectives(config, num_tokens=tokens, devices=devices)

    return run


@pytest.mark.parametrize(
    ("rules", "mesh", "per_block"),
    [
        ("megatron", "tp=4", {"all-reduce": 2}),
        ("column_only", "tp=4", {"all-gather": 4}),
        ("megatron_sp", "tp=4", {"reduce-scatter": 2, "all-gather": 2}),
        ("fsdp", "fsdp=4", {"all-gather": 4}),
        ("dp_attention", "dp=4", {"reduce-scatter": 1, "all-gather": 1}),
        ("context", "cp=4", {"collective-permute": 3}),
        ("megatron", "dp=4", {}),
    ],
)
def test_every_block_costs_what_the_rule_file_says(count, rules, mesh, per_block):
    """Whatever the number of tokens (all rules at both sizes with JAXLLM_FULL_TESTS=1).

    What is left outside of blocks is the tables' and no more than a few.
    """
    for tokens in TOKENS if FULL or rules in ("megatron_sp", "context") else TOKENS[:1]:
        counts = count("dense", mesh, rules, tokens)
        assert counts["per_block"] == NONE | per_block
        outside = {kind: counts["total"][kind] - LAYERS * counts["per_block"][kind] for kind in KINDS}
        assert all(number >= 0 for number in outside.values())
        assert outside["all-to-all"] == 0
        # With tokens cut too, the embedding's sum over the parts of the vocabulary is scattered.
        assert outside["reduce-scatter"] == (rules == "megatron_sp")
        assert sum(outside.values()) <= 4


@pytest.mark.parametrize(
    ("rules", "mesh", "per_block", "in_blocks"),
    [
        ("expert", "ep=4", {"reduce-scatter": 1, "all-gather": 1}, 1),  # the dense layer has none
        ("megatron_sp", "tp=4", {"reduce-scatter": 2, "all-gather": 2}, LAYERS),
    ],
)
def test_routed_layers_cost_what_the_rule_file_says(count, rules, mesh, per_block, in_blocks):
    counts = count("routed", mesh, rules, 64)
    assert counts["per_block"] == NONE | per_block
    assert counts["total"]["reduce-scatter"] == in_blocks * per_block["reduce-scatter"] + (rules == "megatron_sp")
