"""The Llama family: logits of tiny random checkpoints equal transformers; what is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxllm import LLM
from jaxllm.families import read_config
from tests.helpers.logits import engine_logits
from tests.helpers.tiny_model import write_tiny_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


ONE_KV_HEAD = {"num_key_value_heads": 1, "head_dim": 32}


@pytest.mark.parametrize(
    ("overrides", "mesh"),
    [
        ({}, "tp=1"),
        ({"tie_word_embeddings": False, "num_key_value_heads": 4}, "tp=1"),
        (ONE_KV_HEAD, "tp=1"),
        (ONE_KV_HEAD, "tp=4"),
        ({"rope_parameters": LLAMA3_ROPE}, "tp=1"),
    ],
)
def test_logits_equal_transformers(tmp_path: Path, overrides: dict[str, Any], mesh: str) -> None:
    folder = write_tiny_model(tmp_path, **overrides)
    llm = LLM(
        str(folder),
        dtype="float32",
        mesh=mesh,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        max_model_len=128,
        kv_cache_memory_bytes=8 << 20,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(3).integers(0, 256, 50).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(engine_logits(llm.engine, tokens) - expected).max() < 1e-3


BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["OtherForCausalLM"]}, "OtherForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_a_field_that_would_change_the_mathematics_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(BASE | change)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_with_wrong_tensors_is_refused_by_name(tmp_path: Path, change: str) -> None:
    from safetensors.numpy import load_file, save_file

    folder = write_tiny_model(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        name = "model.layers.1.mlp.surprise.weight"
        tensors[name] = np.zeros(3, np.float32)
    else:
        tensors[name] = np.zeros((64, 95), np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        LLM(str(folder))


def test_the_parameter_count_is_that_of_transformers(tiny_llama: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = read_config(json.loads((tiny_llama / "config.json").read_text()))
    assert config.num_parameters == sum(p.numel() for p in theirs.parameters())
