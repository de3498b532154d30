"""The real SmolLM2 through the real engine, against a naive loop and against transformers.

The extremes of chunk budget and page size take part (tests/sharding/test_real_meshes.py has the mesh); with
JAXLLM_FULL_TESTS=1 every combination runs.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from tests.helpers.logits import engine_logits
from tests.helpers.reference import ReferenceLlama

pytestmark = pytest.mark.real_model

LENGTHS = (1, 2, 7, 16, 33, 64, 100, 130)
NUM_NEW = 10
BUDGETS, PAGE_SIZES = (16, 64, 512), (8, 16, 32)
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
SOME = [(16, 8, 1), (512, 32, 1)]
COMBINATIONS = list(itertools.product(BUDGETS, PAGE_SIZES, (1, 3))) if FULL else SOME


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> ReferenceLlama:
    return ReferenceLlama(smollm2_path)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(100, 40000, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def likeliest(reference: ReferenceLlama, prompts: list[list[int]]) -> Callable[[int, tuple[int, ...]], list[int]]:
    return functools.cache(lambda number, output: reference.likeliest(prompts[number], list(output)))


@pytest.mark.parametrize(("budget", "page_size", "tp"), COMBINATIONS)
def test_greedy_tokens_equal_the_naive_loop_alone_and_in_a_mixed_batch(
    smollm2_path: Path, prompts: list[list[int]], likeliest: Callable, budget: int, page_size: int, tp: int
) -> None:
    llm = LLM(
        str(smollm2_path),
        dtype="float32",
        mesh=f"tp={tp}",
        max_num_batched_tokens=budget,
        page_size=page_size,
        max_model_len=256,
        max_num_seqs=4,
        kv_cache_memory_bytes=200 << 20,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    together = [o.outputs[0].token_ids for o in llm.generate(given, params)]
    assert [len(tokens) for tokens in together] == [NUM_NEW] * len(prompts)
    assert [likeliest(i, tuple(tokens)) for i, tokens in enumerate(together)] == together
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in given]
    assert alone == together
    assert max(record.num_tokens for record in llm.engine.records) <= budget
    llm.engine.pool.check([])


def test_logits_equal_transformers_on_the_same_weights(smollm2_path: Path, reference: ReferenceLlama) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    llm = LLM(str(smollm2_path), dtype="float32", max_num_seqs=32, max_num_batched_tokens=32, max_model_len=64)
    cfg = llm.model_config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    ).eval()
    state = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in reference.hf_state().items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # tied
    tokens = llm.get_tokenizer().encode("The capital of France is Paris, and the capital of Italy is Rome.")
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(engine_logits(llm.engine, tokens) - expected).max() < 1e-3


def test_the_default_model_knows_the_capital_of_france(smollm2_path: Path) -> None:
    llm = LLM(str(smollm2_path), max_model_len=256, kv_cache_memory_bytes=64 << 20)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=20))[0].outputs[0]
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
