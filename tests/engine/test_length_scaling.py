"""Rotary embeddings that depend on a sequence's length are chosen by `max_model_len`, and are transformers' there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from jaxllm import LLM
from jaxllm.config import EngineConfig
from jaxllm.weights.source import model_identity
from tests.helpers.logits import engine_logits

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 4 for i in range(8)],
    "long_factor": [1.5 + 2 * i for i in range(8)],
}


def save(config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(folder)
    return model


def engine(folder: Path, max_model_len: int) -> LLM:
    return LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=1 << 20,
    )


@pytest.mark.parametrize(("length", "is_long"), [(30, False), (60, True)])
def test_longrope_factors_are_those_of_the_longest_sequence_served(
    length: int, is_long: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Phi3Config(
        **SIZES, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=LONGROPE
    )
    check(save(config, tmp_path), tmp_path, length, caplog)
    assert any("embeddings of long ones" in r.message for r in caplog.records) == is_long


def test_a_dynamic_base_is_that_of_the_longest_sequence_served(tmp_path: Path, caplog) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = save(LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=rope), tmp_path)
    check(model, tmp_path, 60, caplog)
    with pytest.raises(ValueError, match="max_model_len=65 exceeds the 64 positions"):
        engine(tmp_path, 65)


def check(model: Any, folder: Path, length: int, caplog: pytest.LogCaptureFixture) -> None:
    tokens = np.random.default_rng(0).integers(3, 64, length).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    with caplog.at_level(logging.WARNING):
        llm = engine(folder, length)
    np.testing.assert_allclose(engine_logits(llm.engine, tokens), expected, atol=1e-3, rtol=0)


def test_pages_on_disk_belong_to_one_choice() -> None:
    config = EngineConfig(load_format="dummy")
    names = {model_identity(config, {}, None, longest) for longest in (None, 4096, 8192)}
    assert len(names) == 3
