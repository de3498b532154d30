"""The `LLM` face and the engine's loop on a tiny random model: what users type, and what they get wrong.

More ways to run it with JAXLLM_FULL_TESTS=1.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def make_llm(folder: Path, **kwargs: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return LLM(str(folder), **settings | kwargs)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return make_llm(tiny_llama)


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def prompts(lengths: tuple[int, ...] = (1, 5, 31, 32, 33, 90), seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def ids(outputs: list) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def test_greedy_tokens_equal_transformers(llm: LLM, theirs: LlamaForCausalLM) -> None:
    given = prompts()
    outputs = llm.generate([{"prompt_token_ids": p} for p in given], GREEDY)
    for prompt, output in zip(given, outputs, strict=True):
        with torch.inference_mode():
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert output.outputs[0].token_ids == expected
        assert len(set(expected)) > 3, "a constant answer would hide errors"


WAYS: list[dict[str, Any]] = [
    {"page_size": 4, "max_num_batched_tokens": 8},
    {"max_decode_steps": 1, "page_size": 32},
    {"mesh": "tp=2", "sharding_rules": "column_only"},
    {"mesh": "dp=2,tp=2"},
    {"enable_prefix_caching": False},
]
if os.environ.get("JAXLLM_FULL_TESTS"):
    WAYS += [{"max_num_batched_tokens": 8}, {"page_size": 32}, {"page_size": 4, "max_num_batched_tokens": 16}]
    WAYS += [{"max_num_seqs": 8}, {"mesh": "tp=2"}, {"mesh": "tp=4"}, {"mesh": "tp=2", "sharding_rules": "replicated"}]


@pytest.mark.parametrize("kwargs", WAYS, ids=lambda kwargs: ",".join(f"{k}={v}" for k, v in kwargs.items()))
def test_tokens_do_not_depend_on_how_the_engine_runs(llm: LLM, tiny_llama: Path, kwargs: dict[str, Any]) -> None:
    given = [{"prompt_token_ids": p} for p in prompts()]
    other = make_llm(tiny_llama, **kwargs)
    assert ids(other.generate(given, GREEDY)) == ids(llm.generate(given, GREEDY))
    other.engine.pool.check([])


def test_a_pool_far_too_small_for_all_still_finishes_every_request(llm: LLM, tiny_llama: Path) -> None:
    small = make_llm(tiny_llama, kv_cache_memory_bytes=20 * 4096, max_model_len=96, enable_prefix_caching=False)
    assert small.engine.pool.num_usable < 20
    given = [{"prompt_token_ids": p} for p in prompts((40, 41, 42, 43, 44, 45))]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    outputs = small.generate(given, params)
    assert ids(outputs) == ids(llm.generate(given, params))
    assert sum(o.metrics["num_preemptions"] for o in outputs) > 0
    small.engine.pool.check([])


def test_a_long_prompt_among_decodes_never_exceeds_the_token_budget(tiny_llama: Path) -> None:
    llm = make_llm(
        tiny_llama, max_model_len=4400, max_num_seqs=9, max_num_batched_tokens=64, kv_cache_memory_bytes=32 << 20
    )
    engine = llm.engine
    decodes = [
        engine.add_request(p, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)) for p in prompts((4,) * 8)
    ]
    while any(not r.output_ids for r in decodes):
        engine.step()
    engine.records.clear()
    (prompt,) = prompts((4096,))
    late = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=1))
    while not late.finished:
        engine.step()
    during = [record for record in engine.records if late.request_id in record.request_ids]
    assert all(record.num_tokens <= 64 for record in during)
    assert all(record.num_decodes == 8 for record in during), "a decode was left out while the prompt was prefilled"
    assert len(during) == -(-4096 // (64 - 8))
    for request in decodes:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()


def test_a_newcomer_gets_its_first_token_in_the_iteration_that_admits_it(llm: LLM) -> None:
    engine = llm.engine
    old = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    while len(old.output_ids) < 3:
        engine.step()
    engine.records.clear()
    new = engine.add_request([4, 5, 6, 7], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    while not new.output_ids:
        engine.step()
    with_new = [record for record in engine.records if new.request_id in record.request_ids]
    assert len(with_new) == 1, "it took part in more than one iteration before its first token"
    assert old.request_id in with_new[0].request_ids
    for request in (old, new):
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()


def test_no_compilation_after_warm_up_on_a_mixed_workload(tiny_llama: Path) -> None:
    llm = make_llm(tiny_llama, max_num_seqs=8)
    llm.engine.runner.warm_up()
    mixed = [
        SamplingParams(temperature=0.0, max_tokens=5),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=5, seed=3, max_tokens=9, logprobs=2),
        SamplingParams(
            temperature=1.2, presence_penalty=0.5, repetition_penalty=1.1, logit_bias={7: 2.0}, max_tokens=3
        ),
    ]
    given = [{"prompt_token_ids": p} for p in prompts((1, 3, 30, 33, 64, 90, 7, 8, 9))]
    llm.generate(given, [mixed[i % 3] for i in range(len(given))])
    assert llm.engine.runner.num_compilations_after_warmup == 0


def test_seeded_sampling_is_the_same_alone_and_in_a_batch(llm: LLM) -> None:
    given = [{"prompt_token_ids": p} for p in prompts()]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=10, ignore_eos=True) for i in range(len(given))]
    together = ids(llm.generate(given, params))
    assert together == [ids(llm.generate(p, q))[0] for p, q in zip(given, params, strict=True)]
    other = [SamplingParams(temperature=1.0, seed=i + 50, max_tokens=10, ignore_eos=True) for i in range(len(given))]
    assert together != ids(llm.generate(given, other))


def test_n_completions_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=1, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate("hello", params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 3
    alone = SamplingParams(temperature=1.0, seed=2, max_tokens=8, ignore_eos=True)
    assert output.outputs[1].token_ids == llm.generate("hello", alone)[0].outputs[0].token_ids


def test_stop_conditions_and_their_reasons(llm: LLM) -> None:
    free = llm.generate("stop", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    token = free.token_ids[6]
    first = free.token_ids.index(token)
    by_id = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[token])
    got = llm.generate("stop", by_id)[0].outputs[0]
    assert got.token_ids == free.token_ids[: first + 1]
    assert (got.finish_reason, got.stop_reason) == ("stop", token)
    assert free.finish_reason == "length"
    late = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, stop_token_ids=[token], min_tokens=15)
    got = llm.generate("stop", late)[0].outputs[0]
    assert token not in got.token_ids[:15]


def test_a_stop_string_cuts_the_text_and_ends_the_request(llm: LLM) -> None:
    free = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))[0].outputs[0]
    clean = [c for c in free.text if c.isascii() and c.isprintable()]
    assert clean, "the tiny model must say something printable; choose another seed"
    stop = clean[len(clean) // 2]
    got = llm.generate("abc", SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=stop))[0].outputs[0]
    assert got.text == free.text[: free.text.index(stop)]
    assert (got.finish_reason, got.stop_reason) == ("stop", stop)


def test_logprobs_are_those_of_transformers(llm: LLM, theirs: LlamaForCausalLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=4, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": [5, 6, 7]}, params)
    completion = output.outputs[0]
    with torch.inference_mode():
        logits = theirs(torch.tensor([[5, 6, 7, *completion.token_ids]])).logits[0]
    assert completion.logprobs is not None
    for i, entry in enumerate(completion.logprobs):
        expected = torch.log_softmax(logits[2 + i], -1)
        best = expected.topk(4)
        assert list(entry) == best.indices.tolist()
        assert np.allclose([e.logprob for e in entry.values()], best.values.numpy(), atol=1e-3)
        assert [e.rank for e in entry.values()] == [1, 2, 3, 4]
    total = sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_streamed_pieces_join_to_the_offline_answer(llm: LLM) -> None:
    expected = llm.generate("stream", GREEDY)[0].outputs[0].text
    before = llm.engine.num_completed
    pieces = list(llm.stream("stream", GREEDY))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    records = list(llm.engine.records)[before - llm.engine.num_completed :]
    assert {record.num_steps for record in records} == {1}, "tokens came in bursts"


def test_leaving_a_stream_early_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("stream", SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True))
    next(stream)
    stream.close()
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


def test_a_second_request_reports_its_cached_tokens(tiny_llama: Path) -> None:
    llm = make_llm(tiny_llama)
    (prompt,) = prompts((50,), seed=9)
    assert llm.generate({"prompt_token_ids": prompt}, GREEDY)[0].num_cached_tokens == 0
    assert llm.generate({"prompt_token_ids": prompt}, GREEDY)[0].num_cached_tokens == 48
    assert llm.generate({"prompt_token_ids": prompt, "cache_salt": "x"}, GREEDY)[0].num_cached_tokens == 0


def test_a_bad_prompt_in_a_batch_costs_the_others_nothing(llm: LLM) -> None:
    good = {"prompt_token_ids": [1, 2, 3]}
    bad = [{"prompt_token_ids": []}, "", {"prompt_token_ids": [9999]}, {"prompt_token_ids": [1] * 600}, {"text": "x"}]
    outputs = llm.generate([good, *bad, good], GREEDY, return_errors=True)
    expected = llm.generate(good, GREEDY)[0].outputs[0].token_ids
    assert outputs[0].outputs[0].token_ids == outputs[-1].outputs[0].token_ids == expected
    messages = [o.error or "" for o in outputs[1:-1]]
    for message, words in zip(
        messages, ("empty", "empty", "0..257", "max_model_len is 512", "prompt_token_ids"), strict=True
    ):
        assert words in message and "\n" not in message


def test_without_return_errors_a_bad_prompt_raises_and_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.generate([{"prompt_token_ids": [1]}, {"prompt_token_ids": [-1]}], GREEDY)
    while llm.engine.has_work:
        llm.engine.step()
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"mesh": "tp=3"}, "use tp=1, 2 or 4"),
        ({"mesh": "tp=16"}, "needs 16 devices but there are 8"),
        ({"mesh": "xp=2"}, "axis=size"),
        ({"sharding_rules": "nonsense"}, "megatron"),
        ({"kv_cache_memory_bytes": 1000}, "raise kv_cache_memory_bytes to"),
        ({"max_model_len": 100000}, "16384 positions"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "raise the first"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"speed": 11}, "unknown engine argument 'speed'"),
    ],
)
def test_bad_engine_arguments_say_what_to_do(tiny_llama: Path, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make_llm(tiny_llama, **kwargs)
    assert "\n" not in str(caught.value)


def test_token_id_prompts_need_no_tokenizer(tiny_llama: Path) -> None:
    llm = make_llm(tiny_llama, skip_tokenizer_init=True)
    (output,) = llm.generate({"prompt_token_ids": [1, 2]}, GREEDY)
    assert len(output.outputs[0].token_ids) == 12
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY)


def test_the_largest_min_tokens_is_only_the_limit(tiny_llama: Path) -> None:
    llm = LLM(str(tiny_llama), max_model_len=32, max_num_seqs=2)
    params = SamplingParams(temperature=0.0, max_tokens=None, min_tokens=2**31 - 1)
    (output,) = llm.generate([{"prompt_token_ids": [3, 4, 5]}], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 29
