"""Beam search against a search by brute force over transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxllm import LLM, BeamSearchParams

PROMPTS = [np.random.default_rng(i).integers(0, 256, n).tolist() for i, n in enumerate((5, 16, 27, 1))]


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


def make_llm(folder: Path, **kwargs: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return LLM(str(folder), **settings | kwargs)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return make_llm(tiny_llama)


def by_brute_force(
    model: LlamaForCausalLM, prompt: list[int], width: int, steps: int, eos: tuple[int, ...], penalty: float
) -> list[tuple[list[int], float]]:
    """vLLM's search: at each step the best of every beam's 2 * width continuations; ended ones wait for the end."""

    def score(item: tuple[list[int], float]) -> float:
        tokens, logprob = item
        return logprob / (len(tokens) - (tokens[-1] in eos)) ** penalty

    beams, complete = [(prompt, 0.0)], []
    for _ in range(steps):
        longer = []
        for tokens, logprob in beams:
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].double(), -1)
            top = logprobs.topk(2 * width)
            for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                (complete if token in eos else longer).append(([*tokens, token], logprob + value))
        beams = sorted(longer, key=score, reverse=True)[:width]
    return sorted(complete + beams, key=score, reverse=True)[:width]


@pytest.mark.parametrize(("width", "steps", "penalty"), [(1, 5, 1.0), (4, 9, 1.0), (3, 9, 0.0)])
def test_beams_are_those_of_a_search_by_brute_force(
    llm: LLM, theirs: LlamaForCausalLM, width: int, steps: int, penalty: float
) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=steps, length_penalty=penalty)
    outputs = llm.beam_search([{"prompt_token_ids": p} for p in PROMPTS], params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = by_brute_force(theirs, prompt, width, steps, llm.engine.eos_token_ids, penalty)
        assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
        assert np.allclose([s.cum_logprob for s in output.sequences], [p for _, p in expected], atol=1e-3)
    llm.engine.pool.check([])
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


def test_a_sequence_that_ends_is_kept_aside_and_compared_at_the_end(llm: LLM, theirs: LlamaForCausalLM) -> None:
    free = llm.beam_search({"prompt_token_ids": PROMPTS[0]}, BeamSearchParams(beam_width=4, max_tokens=6))[0]
    likely = free.sequences[1].tokens[len(PROMPTS[0]) + 2]
    before, llm.engine.eos_token_ids = llm.engine.eos_token_ids, (likely,)
    try:
        output = llm.beam_search({"prompt_token_ids": PROMPTS[0]}, BeamSearchParams(beam_width=4, max_tokens=6))[0]
    finally:
        llm.engine.eos_token_ids = before
    expected = by_brute_force(theirs, PROMPTS[0], 4, 6, (likely,), 1.0)
    assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
    assert any(tokens[-1] == likely for tokens, _ in expected), "choose another token: this one ended nothing"
    assert {s.finish_reason for s in output.sequences if s.tokens[-1] == likely} == {"stop"}


def test_too_few_slots_and_pages_for_all_beams_change_nothing(llm: LLM, tiny_llama: Path) -> None:
    small = make_llm(tiny_llama, max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=12 * 4096)
    params = BeamSearchParams(beam_width=5, max_tokens=11)
    given = [{"prompt_token_ids": p} for p in PROMPTS]
    ours = [[s.tokens for s in o.sequences] for o in small.beam_search(given, params)]
    assert ours == [[s.tokens for s in o.sequences] for o in llm.beam_search(given, params)]
    small.engine.pool.check([])
    assert small.engine.pool.num_free == small.engine.pool.num_usable


def test_beams_share_their_prompt_and_copy_only_what_they_write(tiny_llama: Path) -> None:
    llm = make_llm(tiny_llama, enable_prefix_caching=False)
    before = llm.get_metrics()["prefill_tokens_total"]
    prompt = {"prompt_token_ids": list(range(60))}
    most, step = 0, llm.engine.step

    def watched() -> list:
        nonlocal most
        most = max(most, llm.engine.pool.num_usable - llm.engine.pool.num_free)
        return step()

    llm.engine.step = watched  # type: ignore[method-assign]
    llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=8))
    assert llm.get_metrics()["prefill_tokens_total"] - before == 60
    assert most <= 7 + 4 * 2, "the prompt's 7 full pages once, and two of each beam's own"
    assert 3 <= llm.engine.scheduler.num_copies <= 3 * 7


def test_texts_and_logprobs_come_with_the_tokens(llm: LLM) -> None:
    (output,) = llm.beam_search("hi", BeamSearchParams(beam_width=2, max_tokens=5))
    for sequence in output.sequences:
        assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
        generated = sequence.tokens[2:]
        own = [entry[token].logprob for entry, token in zip(sequence.logprobs, generated, strict=True)]
        assert sum(own) == pytest.approx(sequence.cum_logprob)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"beam_width": 0}, "between 1 and 10"),
        ({"beam_width": 11}, "between 1 and 10"),
        ({"max_tokens": 0}, "at least 1"),
        ({"temperature": 0.5}, "leave it at 0"),
    ],
)
def test_bad_parameters_are_refused(kwargs: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4} | kwargs)
