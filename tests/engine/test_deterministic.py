"""`deterministic=True`: tokens and logprobs of a request are the same bits alone and in any company."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams

pytestmark = pytest.mark.optimized

Answer = tuple[list[int], bytes]


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    """bfloat16, where a different order of additions shows; too few pages for all, so that some are preempted."""
    return LLM(
        str(tiny_llama),
        deterministic=True,
        max_model_len=128,
        max_num_seqs=6,
        max_num_batched_tokens=32,
        page_size=8,
        kv_cache_memory_bytes=20 << 11,
    )


def requests() -> list[tuple[list[int], SamplingParams]]:
    rng = np.random.default_rng(0)
    made = []
    for i, length in enumerate((1, 2, 7, 16, 17, 31, 33, 50, 70, 90)):
        sampled = {"temperature": 1.0, "seed": i} if i % 2 else {"temperature": 0.0}
        params = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=1, **sampled)
        made.append((rng.integers(0, 256, length).tolist(), params))
    return made


def run(llm: LLM, chosen: list[int], rng: random.Random) -> dict[int, Answer]:
    """Let requests arrive at random times and collect what each got, bit by bit."""
    engine, all_requests = llm.engine, requests()
    waiting = rng.sample(chosen, len(chosen))
    tokens: dict[str, list[int]] = {}
    logprobs: dict[str, bytes] = {}
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.4:
            which = waiting.pop()
            request = engine.add_request(*all_requests[which], request_id=str(which))
            tokens[request.request_id], logprobs[request.request_id] = [], b""
        for news in engine.step():
            tokens[news.request.request_id] += news.tokens
            logprobs[news.request.request_id] += np.asarray(news.sampled.logprobs).tobytes()
    return {int(name): (tokens[name], logprobs[name]) for name in tokens}


def test_fifty_random_mixes_give_every_request_the_bits_it_gets_alone(llm: LLM) -> None:
    alone = {i: run(llm, [i], random.Random(i))[i] for i in range(len(requests()))}
    assert all(len(set(tokens)) > 2 for tokens, _ in alone.values()), "constant answers would hide errors"
    preempted = llm.engine.scheduler.num_preemptions
    for seed in range(50):
        rng = random.Random(seed)
        llm.engine.pool.reset_prefix_cache()
        for i, answer in run(llm, rng.sample(range(10), rng.randrange(2, 11)), rng).items():
            assert answer == alone[i], f"mix {seed}, request {i}"
    assert llm.engine.scheduler.num_preemptions > preempted
    assert llm.engine.runner.num_compilations <= 3, "more than one shape was run"
