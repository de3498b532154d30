"""`load_format="dummy"`: an engine of any configuration, with no file at all."""

from __future__ import annotations

import json

import jax
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.families import presets

TINY = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "page_size": 4, "kv_cache_memory_bytes": 1 << 20}


def test_a_preset_runs_on_random_weights_made_in_their_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "tiny", TINY)
    llm = LLM("tiny", load_format="dummy", mesh="ep=2,tp=2", **SIZES)
    params = jax.tree.leaves(llm.engine.runner.state.params)
    assert any(not leaf.sharding.is_fully_replicated for leaf in params)
    (output,) = llm.generate(
        [{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    )
    assert len(output.outputs[0].token_ids) == 5


def test_a_folder_needs_no_weights(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    llm = LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, **SIZES)
    (output,) = llm.generate(
        [{"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    )
    assert len(output.outputs[0].token_ids) == 2


def test_a_preset_without_load_format_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="load_format='dummy'"):
        LLM("llama-3.1-8b")
