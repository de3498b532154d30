"""Traces through the real scheduler and page pool, against a least-recently-used cache written here.

The traces are made up by default; `JAXLLM_TRACES=FOLDER` adds the public ones that the folder has.
"""

from __future__ import annotations

import json
import os
import random
from collections import OrderedDict
from pathlib import Path

import pytest

from jaxllm.bench.replay import replay, trace_requests
from jaxllm.bench.workload import trace_rows
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.scheduler import Scheduler

BLOCK = 512
FOLDER = os.environ.get("JAXLLM_TRACES")


def made_up(path: Path, num_requests: int = 1000, seed: int = 0) -> Path:
    """Conversations that grow turn by turn, a few system prompts for all, in Mooncake's columns."""
    rng, fresh, rows = random.Random(seed), iter(range(1000, 10**9)), []
    conversations: list[list[int]] = []
    for i in range(num_requests):
        if not conversations or rng.random() < 0.3:
            conversations.append([rng.randrange(4)])
        blocks = conversations[-1 - min(int(rng.expovariate(0.1)), len(conversations) - 1)]
        blocks += [next(fresh) for _ in range(rng.randrange(1, 8))]
        length = len(blocks) * BLOCK - rng.randrange(BLOCK)
        row = {"timestamp": 10 * i, "input_length": length, "output_length": rng.randrange(1, 300)}
        rows.append(row | {"hash_ids": list(blocks)})
        if len(blocks) > 60:
            conversations.remove(blocks)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trace(name: str, folder: Path) -> Path:
    if name == "made up":
        return made_up(folder / "trace.jsonl")
    if FOLDER is None:
        pytest.skip("JAXLLM_TRACES names no folder")
    path = Path(FOLDER) / name
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


def lru_hits(path: Path, num_requests: int | None, capacity: int) -> tuple[int, int]:
    """Prompt tokens looked up and found, one request after the other, in a cache of `capacity` blocks of 512."""
    cache: OrderedDict[object, None] = OrderedDict()
    asked = found = 0
    for i, (_, input_len, output_len, ids) in enumerate(trace_rows(path)):
        if i == num_requests:
            break
        full = [(tuple(ids[:1]), b) for b in ids[: input_len // BLOCK]]
        hits = 0
        while hits < (input_len - 1) // BLOCK and full[hits] in cache:
            hits += 1
        asked, found = asked + input_len, found + hits * BLOCK
        total = input_len + output_len - 1  # the last token is sampled and never stored
        blocks: list[object] = [*full, *((i, n) for n in range(len(full), total // BLOCK))]
        for block in blocks[:hits]:  # in use: out of the order of eviction
            cache.pop(block, None)
        in_use = -(-total // BLOCK)
        while len(cache) + in_use > capacity:
            cache.popitem(last=False)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
    return asked, found


@pytest.mark.parametrize("name", ["made up", "mooncake_conversation.jsonl"])
@pytest.mark.parametrize(("capacity", "max_num_seqs"), [(1500, 1), (6000, 4)])
def test_the_hit_rate_of_a_trace_is_that_of_an_lru_cache_of_the_same_size(
    name: str, capacity: int, max_num_seqs: int, tmp_path: Path
) -> None:
    path = trace(name, tmp_path)
    capacity = capacity // 4 if name == "made up" else capacity
    asked, found = lru_hits(path, 1000, capacity)
    pool = PagePool(capacity + 1, BLOCK)
    scheduler = Scheduler(pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=200_000, max_decode_steps=64)
    report = replay(trace_requests(path, 1000), scheduler)
    assert report["prefix_cache_queries"] == asked
    assert report["prefix_cache_hit_rate"] == pytest.approx(found / asked, abs=0.005)
    assert report["num_evictions"] > 0, "a cache that holds everything says nothing about eviction"
    pool.check([])


def test_with_room_for_all_every_shared_block_of_the_real_trace_is_found(tmp_path: Path) -> None:
    path = trace("mooncake_conversation.jsonl", tmp_path)
    scheduler = Scheduler(
        PagePool(1 << 20, BLOCK), max_num_seqs=32, max_num_batched_tokens=200_000, max_decode_steps=64
    )
    report = replay(trace_requests(path), scheduler)
    assert report["prefix_cache_hit_rate"] == pytest.approx(0.374, abs=0.003)


@pytest.mark.parametrize("name", ["made up", "sharegpt_lengths.csv"])
def test_hardly_a_token_slot_of_the_pages_in_use_is_empty(name: str, tmp_path: Path) -> None:
    path = trace(name, tmp_path)
    pool = PagePool(40_000, 16, enable_prefix_caching=False)
    scheduler = Scheduler(pool, max_num_seqs=32, max_num_batched_tokens=8192, max_decode_steps=8)
    report = replay(trace_requests(path, 2000 if name != "made up" else 100), scheduler)
    assert report["slot_utilization"] >= 0.99
