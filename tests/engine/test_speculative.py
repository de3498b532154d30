"""Speculative decoding changes no token: whatever is asked, the answer is that of plain decoding.

`eager` engines verify whenever there is a draft, however bad: rejected drafts are the rule there.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.scheduling.request import Ending
from tests.families.tiny import save_tiny
from tests.helpers.tiny_llama import write_tiny_llama

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "page_size": 8,
    "max_decode_steps": 4,
    "kv_cache_memory_bytes": 1 << 21,
}


def eager(folder: Path, **kwargs: Any) -> LLM:
    llm = LLM(str(folder), **SIZES | {"speculative_config": NGRAM} | kwargs)
    llm.engine.runner.draft_price = lambda rows: -1.0
    return llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> LLM:
    return LLM(str(folder), **SIZES)


@pytest.fixture(scope="module")
def speculating(folder: Path) -> LLM:
    llm = eager(folder)
    llm.engine.runner.warm_up()
    return llm


def some_params(rng: random.Random) -> SamplingParams:
    asked: dict[str, Any] = {
        "max_tokens": rng.randrange(1, 60),
        "ignore_eos": True,
        "seed": rng.randrange(100),
        "temperature": rng.choice([0.0, 0.0, 0.3, 1.0]),
    }
    others = {
        "top_k": 2,
        "top_p": 0.7,
        "min_p": 0.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logprobs": 3,
        "logit_bias": {98: 4.0, 101: -3.0},
        "stop_token_ids": list(range(97, 100)),
        "min_tokens": asked["max_tokens"] // 2,
        "allowed_token_ids": list(range(96, 106)),
        "bad_words": ["ab", "c"],
        "num_speculative_tokens": rng.randrange(4),
        "structured_outputs": {"regex": "(ab|cd|abcd)*"},
    }
    chosen = rng.sample(sorted(others), rng.randrange(4))
    return SamplingParams(**asked, **{name: others[name] for name in chosen})


def some_prompt(rng: random.Random) -> dict[str, list[int]]:
    """Few different tokens, repeated: drafts abound."""
    part = [rng.randrange(97, 103) for _ in range(rng.randrange(1, 12))]
    return {"prompt_token_ids": part * rng.randrange(1, 5)}


def test_whatever_is_asked_the_tokens_and_logprobs_are_those_of_plain_decoding(plain: LLM, speculating: LLM) -> None:
    rng = random.Random(0)
    prompts = [some_prompt(rng) for _ in range(32)]
    params = [some_params(rng) for _ in prompts]
    before = speculating.get_metrics()["compilations_total"]
    expected, got = plain.generate(prompts, params), speculating.generate(prompts, params)
    for asked, one, other in zip(params, expected, got, strict=True):
        one, other = one.outputs[0], other.outputs[0]
        assert other.token_ids == one.token_ids, asked
        assert (other.finish_reason, other.stop_reason, other.text) == (one.finish_reason, one.stop_reason, one.text)
        for at, of in zip(one.logprobs or [], other.logprobs or [], strict=True):
            np.testing.assert_allclose([at[t].logprob for t in at], [of[t].logprob for t in at], atol=1e-4)
    drafts = speculating.engine.drafts
    assert drafts.num_accepted_tokens > 30, "nothing was accepted, so nothing was shown"
    assert drafts.num_draft_tokens - drafts.num_accepted_tokens > 200, "nothing was rejected, so nothing was shown"
    assert speculating.get_metrics()["compilations_total"] == before, "something compiled after warm-up"


def test_masks_go_along_with_the_drafts_where_a_grammar_says_what_may_come(plain: LLM, speculating: LLM) -> None:
    """What must come is drafted, what repeats too; the answers, and their logprobs, are those of plain decoding."""
    record = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}}}
    schema = {"type": "array", "items": record | {"required": ["colour", "count"], "additionalProperties": False}}
    asked = [{"json": schema}, {"regex": "(abcabd|abcabe|xyzw)*"}, {"choice": ["a long answer", "a longer one"]}]
    params = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=90, logprobs=2, bad_words=words, structured_outputs=one
        )
        for seed, (one, temperature, words) in enumerate(
            (one, temperature, words) for one in asked for temperature, words in ((0.0, None), (1.0, ["re"]))
        )
    ]
    prompts = [{"prompt_token_ids": [97, 98, 99]}] * len(params)
    drafts = speculating.engine.drafts
    drafted, accepted = drafts.num_draft_tokens, drafts.num_accepted_tokens
    expected, got = plain.generate(prompts, params), speculating.generate(prompts, params)
    for one, other in zip(expected, got, strict=True):
        one, other = one.outputs[0], other.outputs[0]
        assert (other.text, other.token_ids, other.finish_reason) == (one.text, one.token_ids, one.finish_reason)
        for at, of in zip(one.logprobs or [], other.logprobs or [], strict=True):
            np.testing.assert_allclose([at[t].logprob for t in at], [of[t].logprob for t in at], atol=1e-4)
    drafted, accepted = drafts.num_draft_tokens - drafted, drafts.num_accepted_tokens - accepted
    assert accepted > 20 and accepted > 0.6 * drafted, "what a grammar forces is nearly always right"


def test_requests_come_go_and_share_prefixes_and_no_page_is_lost(plain: LLM, folder: Path) -> None:
    engine = eager(folder, kv_cache_memory_bytes=40 * 8 * 256).engine  # fewer pages than four requests want
    rng = random.Random(1)
    heads = [some_prompt(rng)["prompt_token_ids"] for _ in range(3)]
    asked, requests = [], []
    while len(requests) < 25 or engine.has_work:
        if len(requests) < 25 and rng.random() < 0.3:
            prompt = rng.choice(heads) + some_prompt(rng)["prompt_token_ids"]
            params = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=len(requests), max_tokens=70, top_k=3)
            requests.append(engine.add_request(prompt, params))
            asked.append(({"prompt_token_ids": prompt}, params))
        if requests and rng.random() < 0.05:
            engine.finish(rng.choice(requests), Ending("abort"))
        engine.step()
        engine.pool.check([r.pages for r in engine.scheduler.running])
    assert engine.pool.num_free == engine.pool.num_usable
    assert engine.scheduler.num_preemptions > 0 and engine.drafts.num_accepted_tokens > 50
    assert any(request.num_cached for request in requests)
    expected = plain.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    for request, output in zip(requests, expected, strict=True):
        known = output.outputs[0].token_ids
        aborted = request.finish_reason == "abort"
        assert request.output_ids == (known[: len(request.output_ids)] if aborted else known)


def shares(llm: LLM, prompt: list[int], prefix: tuple[int, ...], tokens: list[int], temperature: float) -> list[float]:
    """The exact distribution over `tokens`, the only ones allowed, after prompt and prefix."""
    asked = [{"prompt_token_ids": [*prompt, *prefix, token]} for token in tokens]
    outputs = llm.generate(asked, SamplingParams(max_tokens=1, prompt_logprobs=0))
    raw = [output.prompt_logprobs[-1][token].logprob for output, token in zip(outputs, tokens, strict=True)]
    weights = np.exp(np.array(raw) / temperature)
    return (weights / weights.sum()).tolist()


@pytest.mark.parametrize("temperature", [0.8, 2.0])
def test_sampled_tokens_have_exactly_the_targets_distribution(plain: LLM, speculating: LLM, temperature: float) -> None:
    """Chi-square over all continuations of three tokens, by the chain rule: drafts accepted, rejected, and bonuses."""
    prompt, tokens, count = [97, 98, 99, 97, 98, 99, 98, 97], [97, 98, 99], 500
    chain = {(): 1.0}
    for _ in range(3):
        chain = {
            (*prefix, token): before * share
            for prefix, before in chain.items()
            for token, share in zip(tokens, shares(plain, prompt, prefix, tokens, temperature), strict=True)
        }
    totals = speculating.engine.drafts
    drafted, accepted = totals.num_draft_tokens, totals.num_accepted_tokens
    params = [
        SamplingParams(temperature=temperature, allowed_token_ids=tokens, seed=seed, max_tokens=3, ignore_eos=True)
        for seed in range(count)
    ]
    outputs = speculating.generate([{"prompt_token_ids": prompt}] * count, params)
    drafted, accepted = totals.num_draft_tokens - drafted, totals.num_accepted_tokens - accepted
    assert count // 20 < accepted < drafted - count // 20, "too few drafts of one kind to show anything"
    seen = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert set(seen) <= set(chain)
    likely = [sequence for sequence, share in chain.items() if share * count >= 5]
    cells = [(seen[sequence], chain[sequence] * count) for sequence in likely]
    rest = count - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((count - sum(observed for observed, _ in cells), rest))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = len(cells) - 1
    assert freedom > 4 and statistic < freedom + 4 * (2 * freedom) ** 0.5, "four standard deviations of the chi-square"


@pytest.mark.parametrize("family", ["gemma2", "deepseek_v2", "gpt_oss"])
def test_every_kind_of_attention_verifies_what_it_decodes(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    sizes = SIZES | {"max_model_len": 96, "skip_tokenizer_init": True}
    rng = random.Random(2)
    prompts = [{"prompt_token_ids": [rng.randrange(3, 12) for _ in range(8)] * 3} for _ in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, detokenize=False)
    expected = LLM(str(tmp_path), **sizes).generate(prompts, params)
    llm = eager(tmp_path, **sizes)
    got = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
    assert llm.engine.drafts.num_draft_tokens > 50


QUANTISED = {"kv_dtype": "int8", "quantization": "int8", "max_decode_steps": 1}


@pytest.mark.parametrize("options", [{"mesh": "dp=2,tp=2"}, QUANTISED], ids=["mesh", "quantised"])
def test_on_a_mesh_and_with_quantised_weights_and_cache(folder: Path, options: dict[str, Any]) -> None:
    rng = random.Random(3)
    prompts = [some_prompt(rng) for _ in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected = LLM(str(folder), **SIZES | options).generate(prompts, params)
    llm = eager(folder, **options)
    got = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
    assert llm.engine.drafts.num_accepted_tokens > 10


@pytest.mark.parametrize(("seed", "share"), [(0, (0.8, 1.0)), (1, (0.0, 0.6))], ids=["itself", "another"])
def test_a_draft_model_changes_no_token_however_good_it_is(
    plain: LLM, folder: Path, tmp_path: Path, seed: int, share: tuple[float, float]
) -> None:
    write_tiny_llama(tmp_path, seed=seed)
    config = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    llm = eager(folder, speculative_config=config)
    rng = random.Random(4)
    prompts = [some_prompt(rng) for _ in range(12)]
    params = [some_params(rng) for _ in prompts]
    expected, got = plain.generate(prompts, params), llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in expected]
    assert llm.engine.drafts.num_draft_tokens > 100
    assert share[0] <= llm.engine.drafts.acceptance_rate <= share[1], (
        "grammars' drafts, which are the host's, among them"
    )


def test_a_draft_model_that_does_not_pay_reads_every_sixth_token_only(folder: Path, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=1)
    config = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    llm = LLM(str(folder), **SIZES | {"speculative_config": config})
    llm.engine.runner.draft_price = lambda rows: 100.0
    read = []
    for first, num_tokens in ((3, 4), (4, 10)):
        prompt = {"prompt_token_ids": list(range(first, first + 24))}
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
        keys = np.asarray(llm.engine.runner.memory.draft_pages[0])[1:, 0]  # page 0 is for padding
        read.append(int(keys.any(axis=(-2, -1)).sum()))
    assert read == [24, 24 + 30], "the prompt, and at a length of 30 what came since"


def test_figures_say_what_was_drafted_and_accepted(speculating: LLM) -> None:
    output = speculating.generate([{"prompt_token_ids": [97, 98] * 10}], SamplingParams(temperature=0, max_tokens=40))
    figures, asked = speculating.get_metrics(), output[0].metrics
    per_position = [figures[f'spec_decode_num_accepted_tokens_per_pos_total{{position="{i}"}}'] for i in range(3)]
    assert sum(per_position) == figures["spec_decode_num_accepted_tokens_total"] > 0
    assert per_position == sorted(per_position, reverse=True)
    assert asked["num_draft_tokens"] >= asked["num_accepted_tokens"]
    off = SamplingParams(temperature=0, max_tokens=20, num_speculative_tokens=0)
    assert speculating.generate([{"prompt_token_ids": [97, 98] * 10}], off)[0].metrics["num_draft_tokens"] == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "ngram"}, "needs num_speculative_tokens"),
        ({"method": "medusa", "num_speculative_tokens": 2}, "method='medusa' is not supported"),
        ({"num_speculative_tokens": 2, "draft": 1}, "unknown key 'draft'"),
        ({"method": "draft_model", "num_speculative_tokens": 2}, "belong together"),
        ({"num_speculative_tokens": 0}, "must be in 1..16"),
        ({"num_speculative_tokens": 2.5}, "a whole number"),
        ({"num_speculative_tokens": 2, "prompt_lookup_min": 4, "prompt_lookup_max": 2}, "min <= max"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        LLM("unused", speculative_config=config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("program", ["speculate_greedy", "speculate"])
def test_no_iteration_copies_all_histories(speculating: LLM, program: str, rows: int) -> None:
    """They are as long as slots times positions: whoever reads them as they were before a write has them copied."""
    runner = speculating.engine.runner
    slots, positions = runner.state.slots.history.shape
    text = runner.compiler.program((program, rows)).as_text()
    assert f"s32[{slots},{positions}]" in text
    assert not re.findall(rf"= s32\[{slots},{positions}\]\S* copy\(.*", text)
