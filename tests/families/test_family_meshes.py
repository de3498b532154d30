"""Families with latent rows, sinks, windows, soft-caps, biases and experts under every rule file, against transformers.

Two by default; with JAXLLM_FULL_TESTS=1 all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

NUM_TOKENS = 16
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
CASES = [
    ("deepseek_v3", "dp=2,tp=2", "dp_attention"),
    ("gpt_oss", "cp=2,tp=2", "context"),
    ("deepseek_v3", "cp=2,tp=2", "context"),
    ("deepseek_v3", "fsdp=4", "fsdp"),
    ("deepseek_v2", "ep=4", "expert"),
    ("gemma2", "cp=2,tp=2", "context"),
    ("gemma2", "dp=2,tp=2", "megatron_sp"),
    ("gpt2", "fsdp=4", "fsdp"),
    ("qwen3_moe", "dp=2,tp=2", "dp_attention"),
]


@pytest.mark.parametrize(("name", "mesh", "rules"), CASES if FULL else CASES[:2])
def test_greedy_tokens_equal_transformers(
    tiny_model: Callable, load: Callable, name: str, mesh: str, rules: str
) -> None:
    tiny = tiny_model(name)
    got = load(tiny.folder, mesh, rules).generate(tiny.prompts, NUM_TOKENS)
    assert got == [tokens[:NUM_TOKENS] for tokens in tiny.tokens]
