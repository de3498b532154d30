"""Nothing is silently defaulted: what a family does not understand is refused by name; every field is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import FAMILIES

from jaxllm.config import ModelConfig
from jaxllm.families import notices, read_config
from jaxllm.families.presets import PRESETS
from jaxllm.families.registry import ARCHITECTURES


@pytest.mark.parametrize("name", PRESETS)
def test_fields_that_transformers_does_not_know_are_ignored_with_one_line_that_names_them(name: str, caplog) -> None:
    notices.say_once.cache_clear()
    assert read_config(PRESETS[name] | {"secret_scale": 2, "made_by": "us"}) == read_config(PRESETS[name])
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["made_by, secret_scale"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_missing_size_is_refused_by_every_family(name: str) -> None:
    key = "n_embd" if name == "gpt2" else "hidden_size"
    with pytest.raises(ValueError, match=f"{key}=None"):
        read_config({k: v for k, v in PRESETS[name].items() if k != key})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "axial"}}, "rope_type='axial'"),
        ("llama-3.1-8b", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
        ("gpt-oss-120b", {"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ("gemma-3-27b", {"layer_types": ["chunked_attention"] * 62}, "layer_types"),
        ("gemma-3-27b", {"hidden_activation": "relu6"}, "hidden_activation='relu6'"),
        ("gemma-3-27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
        ("qwen3-8b", {"layer_types": ["sliding_attention"] * 36}, "use_sliding_window"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(PRESETS[name] | change)


def test_a_configuration_is_read_by_its_class_too() -> None:
    assert ModelConfig.from_hf(PRESETS["llama-2-7b"]) == read_config(PRESETS["llama-2-7b"])


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"SecretForCausalLM; supported architectures .* are Llama, Mistral, .*GPT2LMHeadModel"
    ):
        read_config({"architectures": ["SecretForCausalLM"]})


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "deepseek_v3", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "dtype"])
def test_a_wrong_tensor_is_refused_by_name(
    name: str, change: str, tiny_model: Callable, load: Callable, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_model(name).folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    victim = max(key for key in tensors if ".1." in key)
    if change == "missing":
        del tensors[victim]
    elif change == "unexpected":
        victim += "_scale"
        tensors[victim] = np.zeros(3, np.float32)
    elif change == "shape":
        tensors[victim] = np.zeros((*tensors[victim].shape, 2), np.float32)
    else:
        tensors[victim] = tensors[victim].astype(np.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=victim.replace(".", r"\.")):
        load(tmp_path)


def test_every_architecture_has_a_tiny_checkpoint_that_is_compared_with_transformers() -> None:
    assert {tiny.architecture for tiny in FAMILIES.values()} == set(ARCHITECTURES)
