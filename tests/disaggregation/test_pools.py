"""Two pools in one process: the tokens and logprobs of one engine, and exactly the bytes that have to move."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.config import EngineConfig
from jaxllm.disaggregation import passage
from jaxllm.engine.errors import EngineError
from jaxllm.kv.logical import row_bytes
from tests.helpers.tiny_model import write_tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(temperature=1.0, seed=7, top_p=0.9, max_tokens=12, ignore_eos=True, logprobs=2)
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
LENGTHS = (5, 33, 100, 64, 130)
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "three_heads": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 96},
    "routed_windowed": {
        "family": "Mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 20,
    },
    "latent": {
        "family": "DeepseekV3",
        "num_key_value_heads": 4,
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 1,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp(name), num_layers=1, **MODELS[name])

    return make


def make_llm(folder: Path, **kwargs: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 192,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "kv_cache_memory_bytes": 2 << 20,
        "skip_tokenizer_init": True,
        "max_decode_steps": 2,
    }
    return LLM(str(folder), **settings | kwargs)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 256, n).tolist() for n in LENGTHS]


def check_equal(got: list[Any], expected: list[Any], tolerance: float = 1e-3) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        ours = [entry[t].logprob for entry, t in zip(a.outputs[0].logprobs, a.outputs[0].token_ids, strict=True)]
        theirs = [entry[t].logprob for entry, t in zip(b.outputs[0].logprobs, b.outputs[0].token_ids, strict=True)]
        np.testing.assert_allclose(ours, theirs, atol=tolerance)


def check_idle(llm: LLM) -> None:
    for engine in llm.engine.engines:
        for pool in engine.memory.pools:
            pool.check([])


@pytest.mark.parametrize(
    "model, pools, settings",
    [
        ("dense", ("tp=4", "tp=2"), {"page_size": 32, "prefill_page_size": 16}),  # each head twice, then once
        ("three_heads", ("tp=1", "tp=3"), {"kv_dtype": "int8"}),
        ("three_heads", ("tp=3", "tp=1"), {"kv_dtype": "fp8", "prefill_page_size": 32, "enable_prefix_caching": False}),
        ("routed_windowed", ("tp=1", "dp=2,tp=2"), {"page_size": 8, "speculative_config": NGRAM}),
        ("latent", ("tp=2", "tp=1"), {"prefill_page_size": 8}),
    ],
)
def test_tokens_and_logprobs_equal_those_of_one_engine(folder, model, pools, settings) -> None:
    alone = {name: value for name, value in settings.items() if name == "kv_dtype"}
    one = make_llm(folder(model), **alone)
    two = make_llm(folder(model), prefill_mesh=pools[0], decode_mesh=pools[1], **settings)
    for engine in two.engine.engines:
        engine.runner.draft_price = lambda rows: -1.0  # where there are drafts, verify them
    params = [GREEDY, SEEDED, GREEDY, SEEDED, GREEDY]
    check_equal(two.generate(prompts(), params), one.generate(prompts(), params))
    assert two.engine.transfers.handed_over == len(LENGTHS) and not two.engine.transfers.failed
    if "speculative_config" in settings:
        assert sum(engine.drafts.num_draft_tokens for engine in two.engine.engines) > 10
    check_idle(two)


def test_what_the_receiver_has_does_not_travel(folder) -> None:
    llm = make_llm(folder("dense"), prefill_mesh="tp=1", decode_mesh="tp=1")
    token = row_bytes(llm.engine.memory.layout, 1)
    assert token == 2 * 2 * 16 * 4  # one layer, key and value, heads, width, float32
    first = prompts()[2]
    (output,) = llm.generate([first], GREEDY)
    assert llm.engine.transfers.bytes == len(first) * token
    answer = output.outputs[0].token_ids
    second = first + answer + list(range(40, 70))  # the next turn: what was prompt and answer is there already
    known = (len(first) + len(answer) - 1) // 16 * 16  # the answer's last token was never computed
    moved = llm.engine.transfers.bytes
    llm.generate([second], GREEDY)
    assert llm.engine.transfers.bytes - moved == (len(second) - known) * token
    check_idle(llm)


def test_a_receiver_without_room_is_waited_for_and_loses_nothing(folder) -> None:
    one = make_llm(folder("dense"))
    two = make_llm(
        folder("dense"),
        prefill_mesh="tp=1",
        decode_mesh="tp=1",
        kv_cache_memory_bytes=13 * 16 * 256,
        prefill_kv_cache_memory_bytes=2 << 20,
    )
    check_equal(two.generate(prompts() * 2, GREEDY), one.generate(prompts() * 2, GREEDY))
    check_idle(two)


def test_what_is_not_handed_over_in_time_is_not_waited_for(monkeypatch) -> None:
    """The thread that steps both engines compiles, say: the pages are computed again, and nobody fails."""
    monkeypatch.setattr(passage, "_FETCH_SECONDS", 0.05)
    offer = passage.LocalOffer(SimpleNamespace(wanted=deque()), 0, [1, 2], 32, 0, 0.0)  # type: ignore[arg-type]
    spans = [(0, 16), (16, 32)]
    for span in spans:
        offer.want(*span)
    offer.arrived(spans[:1], ["slab"])
    assert offer.fetch(spans) == ["slab", None]


def test_several_completions_stops_beams_and_scores(folder) -> None:
    from jaxllm.decoding.beam_search import BeamSearchParams

    one = make_llm(folder("dense"))
    two = make_llm(folder("dense"), prefill_mesh="tp=1", decode_mesh="tp=1")
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=6, ignore_eos=True, prompt_logprobs=1)
    for a, b in zip(two.generate(prompts()[:3], params), one.generate(prompts()[:3], params), strict=True):
        assert [c.token_ids for c in a.outputs] == [c.token_ids for c in b.outputs]
        assert [set(entry or ()) for entry in a.prompt_logprobs] == [set(entry or ()) for entry in b.prompt_logprobs]
    short = SamplingParams(temperature=0.0, max_tokens=1)
    assert [o.outputs[0].finish_reason for o in two.generate(prompts(), short)] == ["length"] * len(LENGTHS)
    beams = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    (a,), (b,) = two.beam_search(prompts()[:1], beams), one.beam_search(prompts()[:1], beams)
    assert [s.tokens for s in a.sequences] == [s.tokens for s in b.sequences]
    check_idle(two)


def test_a_failed_step_in_either_pool_costs_no_token(folder, monkeypatch) -> None:
    llm = make_llm(folder("dense"), prefill_mesh="tp=1", decode_mesh="tp=1")
    expected = llm.generate(prompts(), GREEDY)
    for engine in llm.engine.engines:
        real, calls = engine.runner.dispatch, []

        def dispatch(plan: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return real(plan)

        monkeypatch.setattr(engine.runner, "dispatch", dispatch)
        stream = llm.stream(prompts()[2], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
        with pytest.raises((KeyboardInterrupt, EngineError)):
            for _ in stream:
                pass
        check_equal(llm.generate(prompts(), GREEDY), expected)
        check_idle(llm)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"prefill_mesh": "tp=1"}, "prefill_mesh and decode_mesh belong together"),
        ({"prefill_page_size": 16}, "prefill_page_size is for two pools"),
        ({"prefill_mesh": "tp=1", "decode_mesh": "tp=1", "mesh": "tp=2"}, "mesh is for one pool"),
        ({"prefill_mesh": "tp=1", "decode_mesh": "tp=1", "prefill_max_num_seqs": 0}, "prefill_max_num_seqs=0"),
        ({"prefill_mesh": "tp=1", "decode_mesh": "tp=1", "distributed": True}, "are for one process"),
    ],
)
def test_what_makes_no_two_pools_is_refused(kwargs, message) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_kwargs(kwargs)
