"""Every rule file on many meshes gives the tokens of one device: paged, chunked, batched, with cached prefixes.

The one-device run is itself checked against transformers in tests/models and tests/engine. More meshes with
JAXLLM_FULL_TESTS=1.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from tests.helpers.tiny_model import write_tiny_model

VOCAB, NUM_NEW = 96, 9
LENGTHS = (1, 5, 23, 40, 9, 17)
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
DENSE = [
    ("tp=8", "megatron"),  # two key/value heads, four copies of each
    ("tp=4", "megatron_sp"),
    ("fsdp=8", "fsdp"),
    ("dp=2,tp=2", "dp_attention"),
    ("dp=2,cp=2,tp=2", "context"),
]
SIX_HEADS = [("dp=2,tp=3", "megatron"), ("tp=3", "megatron_sp")]  # 4 rows on 3 devices: a decode runs as megatron
ROUTED = [
    ("dp=2,ep=2,tp=2", "megatron"),
    ("ep=4", "expert"),
    ("dp=4", "dp_attention"),
]
if FULL:
    DENSE += [("dp=8", "megatron"), ("dp=2,tp=2", "column_only"), ("dp=2,tp=2", "megatron_sp"), ("cp=8", "context")]
    DENSE += [("dp=2,tp=4", "megatron"), ("cp=4", "context")]
    ROUTED += [("ep=4", "megatron"), ("ep=2,tp=2", "expert"), ("fsdp=4", "fsdp"), ("cp=2,ep=2", "context")]
    ROUTED += [("tp=2", "megatron_sp")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Tiny checkpoints by kind, made on first use."""

    @functools.cache
    def make(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        if kind == "routed":
            return _write_routed(path)
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        if kind == "six_heads":
            heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 96}
        return write_tiny_model(path, vocab_size=VOCAB, **heads)

    return make


def _write_routed(path: Path) -> Path:
    """One dense and one routed layer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
    return path


def prompts() -> list[dict[str, Any]]:
    """Prompts of many lengths, two of which begin alike."""
    rng = np.random.default_rng(3)
    ids = [rng.integers(3, VOCAB, length).tolist() for length in LENGTHS]
    return [{"prompt_token_ids": p} for p in [*ids, ids[3][:24] + ids[2][:6]]]


def tokens(path: Path, mesh: str, rules: str) -> list[list[int]]:
    """Greedy tokens of the prompts, twice in one engine: the second time most of each prompt is cached."""
    llm = LLM(
        str(path),
        mesh=mesh,
        sharding_rules=rules,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        page_size=4,
        max_decode_steps=4,
        kv_cache_memory_bytes=1 << 20,
        use_tqdm=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    first, second = (
        [o.outputs[0].token_ids for o in llm.generate(prompts(), params, use_tqdm=False)] for _ in range(2)
    )
    assert first == second
    assert llm.engine.pool.num_hit_tokens > 0
    llm.engine.pool.check([])
    return first


@pytest.fixture(scope="module")
def alone(folder):
    """What one device makes of each checkpoint."""
    return functools.cache(lambda kind: tokens(folder(kind), "tp=1", "replicated"))


def _cases() -> list[Any]:
    kinds = (("dense", DENSE), ("six_heads", SIX_HEADS), ("routed", ROUTED))
    return [pytest.param(kind, *case, id=f"{kind}-{case[1]}-{case[0]}") for kind, cases in kinds for case in cases]


@pytest.mark.parametrize(("kind", "mesh", "rules"), _cases())
def test_tokens_equal_those_of_one_device(folder, alone, kind: str, mesh: str, rules: str) -> None:
    assert tokens(folder(kind), mesh, rules) == alone(kind)


def test_the_rule_file_of_the_documentation_works_from_a_path(folder, alone, tmp_path: Path) -> None:
    """Weights cut over both axes, gathered over one of them."""
    text = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.split("```toml\n")[1].split("```")[0], encoding="utf-8")
    assert tokens(folder("dense"), "fsdp=2,tp=2", str(tmp_path / "mine.toml")) == alone("dense")


def test_reference_tokens_depend_on_the_prompt(alone) -> None:
    for kind in ("dense", "six_heads", "routed"):
        assert len({tuple(t) for t in alone(kind)}) == len(alone(kind)), "a constant would hide every fault"


def test_seeded_samples_logprobs_and_prompt_scores_do_not_depend_on_replicas(folder) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)

    def run(mesh: str) -> list[Any]:
        llm = LLM(
            str(folder("dense")),
            mesh=mesh,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            page_size=4,
            max_decode_steps=4,
            kv_cache_memory_bytes=1 << 20,
            use_tqdm=False,
        )
        return llm.generate(prompts(), params, use_tqdm=False)

    for one, other in zip(run("tp=1"), run("dp=2,tp=2"), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=1e-3)
        assert _values(one.prompt_logprobs) == pytest.approx(_values(other.prompt_logprobs), abs=1e-3)


def _values(prompt_logprobs: Any) -> list[float]:
    return [p.logprob for position in prompt_logprobs if position for p in position.values()]
