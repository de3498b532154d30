"""Host and disk tiers, swapping and sharing with a tiny model: the same tokens with every feature on or off."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, AsyncLLM, SamplingParams
from jaxllm.cli import main
from jaxllm.entrypoints.exclusive import Exclusive
from jaxllm.runner.runner import ModelRunner
from jaxllm.scheduling.request import Request

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PAGE_BYTES = 2 * 2 * 8 * 2 * 16 * 4  # layers, K and V, tokens, heads, width, float32


def make_llm(folder: Path, **kwargs: Any) -> LLM:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 1100,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return LLM(str(folder), **settings | kwargs)


def make_small(folder: Path, **kwargs: Any) -> LLM:
    """8 slots and 12 pages."""
    return make_llm(folder, max_num_seqs=8, max_model_len=64, kv_cache_memory_bytes=13 * PAGE_BYTES, **kwargs)


def prompts(lengths: tuple[int, ...] = (90, 33, 70, 50, 44, 61), seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, 256, n).tolist()} for n in lengths]


def ids(outputs: list) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> LLM:
    return make_llm(tiny_llama)


@pytest.fixture(scope="module")
def expected(plain: LLM) -> list[list[int]]:
    return ids(plain.generate(prompts(), GREEDY))


def wait_for_disk(llm: LLM) -> None:
    llm.engine.evict_idle()
    assert llm.engine.mover is not None
    llm.engine.mover.flush()


def test_a_second_batch_after_eviction_is_loaded_and_not_computed(tiny_llama: Path, expected: list) -> None:
    llm = make_llm(tiny_llama, host_kv_bytes=100 * PAGE_BYTES)
    llm.engine.runner.warm_up(sampling=False, tiers=True)
    assert ids(llm.generate(prompts(), GREEDY)) == expected
    before = llm.get_metrics()
    llm.engine.evict_idle()
    outputs = llm.generate(prompts(), GREEDY)
    assert ids(outputs) == expected
    assert [o.num_cached_tokens for o in outputs] == [88, 32, 64, 48, 40, 56]
    after = llm.get_metrics()
    assert after["prefix_cache_host_hits_total"] == 328
    assert after["prefix_cache_device_hits_total"] == before["prefix_cache_device_hits_total"]
    assert after["prefill_tokens_total"] - before["prefill_tokens_total"] == 348 - 328
    assert after["kv_host_bytes"] == after["kv_device_evictions_total"] * PAGE_BYTES
    assert after["kv_moved_in_bytes_total"] == 41 * PAGE_BYTES
    assert after["kv_host_usage_perc"] == after["kv_host_bytes"] / (100 * PAGE_BYTES)
    assert llm.engine.runner.num_compilations_after_warmup == 0


def test_what_the_host_cannot_keep_goes_to_the_disk_and_another_mesh_reads_it(
    tiny_llama: Path, expected: list, tmp_path: Path
) -> None:
    disk = {"disk_kv_bytes": 4 << 20, "disk_kv_path": str(tmp_path)}
    writer = make_llm(tiny_llama, host_kv_bytes=10 * PAGE_BYTES, mesh="tp=4", **disk)
    assert writer.engine.runner.model.kv_copies == 2
    assert ids(writer.generate(prompts(), GREEDY)) == expected
    wait_for_disk(writer)
    sizes = {f.stat().st_size for f in tmp_path.iterdir()}
    assert len(sizes) == 1 and PAGE_BYTES < sizes.pop() < 1.5 * PAGE_BYTES, "each key/value head is stored once"
    reader = make_llm(tiny_llama, host_kv_bytes=10 * PAGE_BYTES, **disk)
    outputs = reader.generate(prompts(), GREEDY)
    assert ids(outputs) == expected
    assert [o.num_cached_tokens for o in outputs] == [88, 32, 64, 48, 40, 56]
    assert reader.get_metrics()["prefix_cache_disk_hits_total"] == 328


def test_an_8_bit_cache_comes_back_from_the_disk_with_its_scales(tiny_llama: Path, tmp_path: Path) -> None:
    disk = {"host_kv_bytes": 40 * PAGE_BYTES, "disk_kv_bytes": 4 << 20, "disk_kv_path": str(tmp_path)}
    writer = make_llm(tiny_llama, kv_dtype="int8", **disk)
    expected = ids(writer.generate(prompts(), GREEDY))
    wait_for_disk(writer)
    reader = make_llm(tiny_llama, kv_dtype="int8", **disk)
    assert ids(reader.generate(prompts(), GREEDY)) == expected
    assert reader.get_metrics()["prefix_cache_disk_hits_total"] == 328


def test_damaged_pages_are_computed_again(tiny_llama: Path, expected: list, tmp_path: Path) -> None:
    settings = {"host_kv_bytes": 4 * PAGE_BYTES, "disk_kv_bytes": 4 << 20, "disk_kv_path": str(tmp_path)}
    writer = make_llm(tiny_llama, **settings)
    writer.generate(prompts(), GREEDY)
    wait_for_disk(writer)
    files = sorted(tmp_path.iterdir())
    for file in files[::3]:
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
    reader = make_llm(tiny_llama, **settings)
    assert ids(reader.generate(prompts(), GREEDY)) == expected
    metrics = reader.get_metrics()
    assert metrics["kv_disk_damaged_pages_total"] > 0
    assert 0 < metrics["prefix_cache_disk_hits_total"] < 328
    reader.engine.pool.check([])


def test_others_go_on_while_a_load_takes_its_time(tiny_llama: Path, expected: list) -> None:
    llm = make_llm(tiny_llama, host_kv_bytes=100 * PAGE_BYTES)
    llm.generate(prompts()[:1], GREEDY)
    llm.engine.evict_idle()
    mover = llm.engine.mover
    assert mover is not None
    bring, released = mover._bring, []

    def slowly(*args: Any) -> Any:
        while not released:
            time.sleep(0.001)
        return bring(*args)

    mover._bring = slowly  # type: ignore[method-assign]
    engine = llm.engine
    waiting = engine.add_request(prompts()[0]["prompt_token_ids"], GREEDY)
    other = engine.add_request(prompts()[1]["prompt_token_ids"], GREEDY)
    while not other.finished:
        engine.step()
    loading, has_output = waiting.held.load is not None, bool(waiting.output_ids)
    released.append(True)  # before anything can fail: the reader must end
    assert loading and not has_output
    while not waiting.finished:
        engine.step()
    assert [waiting.output_ids, other.output_ids] == expected[:2]


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_a_pool_too_small_by_four_finishes_every_request_with_the_same_tokens(
    plain: LLM, tiny_llama: Path, mode: str
) -> None:
    rng = np.random.default_rng(5)
    given = [{"prompt_token_ids": rng.integers(0, 256, 20).tolist()} for _ in range(12)]
    params = SamplingParams(temperature=0.0, max_tokens=28, ignore_eos=True)  # 6 pages each
    small = make_small(tiny_llama, host_kv_bytes=400 * PAGE_BYTES, preemption_mode=mode, enable_prefix_caching=False)
    assert small.engine.pool.num_usable == 8 * 6 // 4
    outputs = small.generate(given, params)
    assert ids(outputs) == ids(plain.generate(given, params))
    metrics = small.get_metrics()
    assert metrics["num_preemptions_total"] > 0
    if mode != "auto":
        assert (metrics["kv_swaps_out_total"] > 0) == (mode == "swap")
    assert metrics["kv_swaps_in_total"] == metrics["kv_swaps_out_total"]
    assert metrics["kv_host_bytes"] == 0
    small.engine.pool.check([])


def test_requests_with_a_common_prefix_that_arrive_together_compute_it_once(plain: LLM) -> None:
    plain.engine.records.clear()
    rng = np.random.default_rng(1)
    common = rng.integers(0, 256, 1024).tolist()
    given = [{"prompt_token_ids": common + rng.integers(0, 256, 16).tolist()} for _ in range(16)]
    plain.generate(given, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    assert 1024 + 16 * 16 <= sum(r.num_prefill_tokens for r in plain.engine.records) <= 1024 + 16 * (16 + 8)


def test_completions_of_one_prompt_share_its_last_page_too(tiny_llama: Path, expected: list) -> None:
    llm = make_llm(tiny_llama, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, n=4, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate(prompts()[:1], params)
    assert sum(r.num_prefill_tokens for r in llm.engine.records) == 90 + 3
    assert llm.get_metrics()["kv_page_copies_total"] == 3
    assert [c.token_ids for c in output.outputs] == [expected[0]] * 4


def test_completions_share_their_prompt_on_every_replica(tiny_llama: Path, expected: list) -> None:
    llm = make_llm(tiny_llama, mesh="dp=2")
    params = SamplingParams(temperature=0.0, n=2, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(prompts(), params)
    assert [[c.token_ids for c in o.outputs] for o in outputs] == [[tokens] * 2 for tokens in expected]
    metrics = llm.get_metrics()
    assert 0 < metrics["kv_page_copies_total"] <= len(expected)
    usable = llm.engine.runner.shapes.num_pages - 1
    assert metrics["kv_device_capacity_bytes"] == 2 * usable * PAGE_BYTES


@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_features_under_preemption_and_abort_gives_the_same_tokens(
    plain: LLM, tiny_llama: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    small = make_small(
        tiny_llama,
        enable_prefix_caching=seed != 1,
        preemption_mode=("swap", "swap", "recompute")[seed],
        host_kv_bytes=(12, 200, 12)[seed] * PAGE_BYTES,
        disk_kv_bytes=1 << 20,
        disk_kv_path=str(tmp_path),
    )
    shared = [rng.randrange(256) for _ in range(30)]
    done: list[Request] = []
    aborted: set[str] = set()
    for _ in range(40):
        prompt = shared[: rng.randrange(12)] + [rng.randrange(256) for _ in range(rng.randrange(1, 6))]
        params = SamplingParams(temperature=0.0, max_tokens=rng.randrange(20, 44), ignore_eos=True)
        parent = None
        for _ in range(rng.choice([1, 1, 3])):
            parent = small.engine.add_request(prompt, params, parent=parent)
            done.append(parent)
        for _ in range(rng.randrange(3)):
            small.engine.step()
            small.engine.pool.check([r.pages for r in small.engine.scheduler.running])
        if rng.random() < 0.1:
            small.engine.abort(done[-1].request_id)
            aborted.add(done[-1].request_id)
    while small.engine.has_work:
        small.engine.step()
    assert sum(r.num_preemptions for r in done) > 0
    given = [{"prompt_token_ids": r.token_ids[: r.num_prompt]} for r in done]
    limits = [SamplingParams(temperature=0.0, max_tokens=r.limit - r.num_prompt, ignore_eos=True) for r in done]
    for request, tokens in zip(done, ids(plain.generate(given, limits)), strict=True):
        count = len(request.output_ids) if request.request_id in aborted else None
        assert request.output_ids == tokens[:count]
    assert small.engine.pool.num_free == small.engine.pool.num_usable
    small.engine.pool.check([])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"host_kv_bytes": -1}, "0 for none"),
        ({"host_kv_bytes": 100}, "less than one page; use at least 4096"),
        ({"disk_kv_bytes": 1, "disk_kv_path": "x"}, "set both"),
        ({"host_kv_bytes": 9999, "disk_kv_bytes": 1}, "set both"),
        ({"preemption_mode": "drop"}, "auto, recompute, swap"),
        ({"preemption_mode": "swap"}, "set host_kv_bytes"),
    ],
)
def test_bad_sizes_are_refused_with_the_way_out(tiny_llama: Path, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_llm(tiny_llama, **kwargs)


def test_a_model_with_windows_everywhere_holds_few_pages_and_gives_the_same_tokens(tmp_path: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=20,
        initializer_range=0.2,
        dtype="float32",
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    given, params = prompts((70, 33)), SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    tokens = []
    for window in (20, None):
        llm = make_llm(tmp_path, skip_tokenizer_init=True, host_kv_bytes=100 * PAGE_BYTES)
        engine = llm.engine
        assert engine.pool.window == 20
        engine.pool.window = window
        requests = [engine.add_request(p["prompt_token_ids"], params) for p in given]
        most = 0
        while engine.has_work:
            engine.step()
            decoding = [r for r in engine.scheduler.running if r.num_left == 1]
            most = max([most, *(sum(page > 0 for page in r.pages) for r in decoding)])
        tokens.append([r.output_ids for r in requests])
        assert (most <= 4 + 2) == (window == 20), "20 keys lie in at most 4 pages of 8, and a loop goes 8 tokens ahead"
        engine.evict_idle()
        again = llm.generate(given, params)
        assert ids(again) == tokens[-1]
        assert [o.num_cached_tokens for o in again] == [64, 32]
    assert tokens[0] == tokens[1]


def test_after_a_failed_iteration_no_tier_gives_back_what_it_held(tiny_llama: Path, expected: list) -> None:
    llm = make_llm(tiny_llama, host_kv_bytes=100 * PAGE_BYTES)
    engine = llm.engine
    llm.generate(prompts(), GREEDY)
    engine.evict_idle()
    running = [engine.add_request(p["prompt_token_ids"], GREEDY) for p in prompts()[:4]]
    engine.step()
    assert any(r.held.load is not None for r in running)
    engine.recover()
    assert engine.tiers is not None and len(engine.tiers.host) == 0
    while engine.has_work:
        engine.step()
    assert [r.output_ids for r in running] == expected[:4], "they began anew"
    assert ids(llm.generate(prompts(), GREEDY)) == expected
    assert engine.pool.num_free == engine.pool.num_usable


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_replicas_share_the_tiers(tiny_llama: Path, expected: list, tmp_path: Path, mode: str) -> None:
    disk = {"disk_kv_bytes": 4 << 20, "disk_kv_path": str(tmp_path)}
    llm = make_llm(tiny_llama, host_kv_bytes=60 * PAGE_BYTES, mesh="dp=2,tp=2", preemption_mode=mode, **disk)
    assert ids(llm.generate(prompts(), GREEDY)) == expected
    llm.engine.evict_idle()
    outputs = llm.generate(list(reversed(prompts())), GREEDY)  # onto other replicas than before
    assert ids(outputs) == list(reversed(expected))
    metrics = llm.get_metrics()
    assert metrics["prefix_cache_host_hits_total"] + metrics["prefix_cache_disk_hits_total"] > 200
    assert metrics["kv_failed_loads_total"] == 0
    for part in llm.engine.scheduler.parts:
        part.pool.check([])


CACHED = [88, 32, 64, 48, 40, 56]  # full pages of the prompts, without the last token


@pytest.mark.parametrize("num_host_pages", [4, 100])
def test_what_is_cached_at_a_clean_end_is_on_the_disk(
    tiny_llama: Path, expected: list, tmp_path: Path, num_host_pages: int
) -> None:
    settings = {"disk_kv_bytes": 4 << 20, "disk_kv_path": str(tmp_path), "host_kv_bytes": num_host_pages * PAGE_BYTES}
    with make_llm(tiny_llama, **settings) as writer:
        assert ids(writer.generate(prompts(), GREEDY)) == expected
    files = sorted(tmp_path.iterdir())
    writer.close()
    assert sorted(tmp_path.iterdir()) == files, "closing again changes nothing"
    reader = make_llm(tiny_llama, **settings)
    outputs = reader.generate(prompts(), GREEDY)
    assert ids(outputs) == expected
    assert [o.num_cached_tokens for o in outputs] == CACHED
    assert reader.get_metrics()["kv_disk_dropped_writes_total"] == 0


def test_closing_ends_open_streams_and_takes_no_longer_than_it_may(tiny_llama: Path, tmp_path: Path) -> None:
    llm = make_llm(
        tiny_llama, host_kv_bytes=100 * PAGE_BYTES, disk_kv_bytes=4 << 20, disk_kv_path=str(tmp_path), max_num_seqs=2
    )
    stream = llm.stream(prompts()[0], SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True))
    next(stream)
    mover = llm.engine.mover
    assert mover is not None
    write, written = mover._write, []

    def slowly(key: bytes, slab: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(key)
        write(key, slab)

    mover._write = slowly  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.close()
    mover._write = write  # type: ignore[method-assign]
    assert len(list(tmp_path.iterdir())) == 3
    llm.engine.save_cache(seconds=0.0)
    assert len(list(tmp_path.iterdir())) == 3, "no time, nothing written"
    llm.close()
    assert len(list(tmp_path.iterdir())) >= 11, "the interrupted call lost nothing"
    assert not llm.engine.has_work or not llm.engine.unfinished
    stream.close()


def test_a_script_that_just_ends_leaves_its_pages_on_the_disk(tiny_llama: Path, tmp_path: Path) -> None:
    script = f"""
from jaxllm import LLM, SamplingParams
llm = LLM({str(tiny_llama)!r}, dtype="float32", page_size=8, max_model_len=64, max_num_seqs=2, host_kv_bytes=1 << 20,
          kv_cache_memory_bytes=1 << 20, disk_kv_bytes=4 << 20, disk_kv_path={str(tmp_path)!r})
llm.generate([{{"prompt_token_ids": list(range(33))}}], SamplingParams(temperature=0.0, max_tokens=1))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert run.returncode == 0, run.stderr
    assert "could not" not in run.stderr
    assert len(list(tmp_path.iterdir())) == 4


def test_a_server_that_shuts_down_leaves_its_pages_on_the_disk(tiny_llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 2,
        "page_size": 8,
        "host_kv_bytes": 100 * PAGE_BYTES,
        "kv_cache_memory_bytes": 8 << 20,
        "disk_kv_bytes": 4 << 20,
        "disk_kv_path": str(tmp_path),
    }

    async def answer(llm: AsyncLLM) -> list[int]:
        last = [output async for output in llm.generate(prompts()[0], GREEDY)][-1]  # type: ignore[arg-type]
        return last.outputs[0].token_ids

    llm = AsyncLLM(str(tiny_llama), **settings)
    tokens = asyncio.run(answer(llm))
    llm.shutdown()
    assert len(list(tmp_path.iterdir())) == (90 + 11) // 8
    llm.shutdown()  # once more is harmless
    again = AsyncLLM(str(tiny_llama), **settings)
    assert asyncio.run(answer(again)) == tokens
    assert again.engine.tiers is not None and again.engine.tiers.stats.disk_hits == 88 // 8
    again.shutdown()


@pytest.mark.parametrize("when", ["inside a step", "between steps"])
def test_ctrl_c_ends_a_command_with_its_pages_on_the_disk(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    dispatch, calls = ModelRunner.dispatch, []

    def interrupted(runner: ModelRunner, plan: Any) -> Any:
        calls.append(plan)
        if len(calls) == 12 and when == "inside a step":
            os.kill(os.getpid(), signal.SIGINT)
        return dispatch(runner, plan)

    monkeypatch.setattr(ModelRunner, "dispatch", interrupted)
    if when == "between steps":
        monkeypatch.setattr(Exclusive, "is_shared", property(lambda _: len(calls) == 12 and signal.raise_signal(2)))
    command = ["generate", *(letter * 30 for letter in "abcdefgh"), "--model", str(tiny_llama), "--dtype", "float32"]
    command += ["--max-tokens", "8", "--max-model-len", "64", "--max-num-seqs", "1", "--ignore-eos", "--page-size", "8"]
    command += ["--kv-cache-memory-bytes", "1000000", "--host-kv-bytes", "1000000", "--disk-kv-bytes", "1000000"]
    assert main([*command, "--disk-kv-path", str(tmp_path)]) == 130
    assert len(list(tmp_path.iterdir())) > 4
