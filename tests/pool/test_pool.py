"""A pool answers as each model alone would, whoever is on the device, and nothing is left behind."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.pool.budget import NoRoom
from jaxllm.pool.cache_part import Where
from jaxllm.pool.pool import Pool, UnknownModel
from tests.helpers.patience import patience
from tests.pool.conftest import BUDGET, ENGINE, check_nothing_leaked

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=7, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello", "the cat sat on", "x" * 40, "one two three"]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(four_models: dict[str, Path]):
    """What each model says by itself."""
    said = {}
    for name, path in four_models.items():
        llm = LLM(str(path), **ENGINE)
        said[name] = [tokens(llm.generate(PROMPTS, params)) for params in (GREEDY, SEEDED)]
    return said


def test_same_tokens_as_alone_while_models_take_turns(pool: Pool, four_models, alone):
    def ask(name: str, which: int):
        return tokens(pool.generate(name, PROMPTS, (GREEDY, SEEDED)[which]))

    calls = [(name, which) for _ in range(3) for name in four_models for which in (0, 1)]
    random.Random(0).shuffle(calls)
    before = pool.residents.totals.count
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda call: ask(*call), calls))
    for (name, which), result in zip(calls, results, strict=True):
        assert result == alone[name][which], name
    assert pool.residents.totals.count - before >= 4, "the models did switch"
    check_nothing_leaked(pool)


def test_a_request_goes_on_where_it_was_after_its_model_slept(pool: Pool, alone):
    """In the middle of an answer the model leaves the device with its pages, and comes back."""
    result = {}
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    expected = tokens(pool.generate("llama", PROMPTS[:2], long))
    thread = threading.Thread(target=lambda: result.update(got=tokens(pool.generate("llama", PROMPTS[:2], long))))
    engine = pool.llm("llama").engine
    before = engine.accounting.totals.generation_tokens
    thread.start()
    for _ in range(5):
        while thread.is_alive() and engine.accounting.totals.generation_tokens == before:
            pass
        before = engine.accounting.totals.generation_tokens
        pool.sleep("llama")
    thread.join(patience(60))
    assert result["got"] == expected
    check_nothing_leaked(pool)


def on_its_thread(pool: Pool, function):
    return pool.driver.call(function).result(patience(20))


def test_a_cache_keeps_its_bytes_until_it_is_copied_and_stays_if_it_is_needed_before(pool: Pool, alone, monkeypatch):
    model, may_copy, copying = pool.model("llama"), threading.Event(), threading.Event()
    write = pool.host_kv.write

    def slow_write(block, page):
        copying.set()
        assert may_copy.wait(patience(20))
        write(block, page)

    assert tokens(pool.generate("llama", PROMPTS, GREEDY)) == alone["llama"][0]
    pool.wake_up("llama")
    monkeypatch.setattr(pool.host_kv, "write", slow_write)
    held = pool.residents.budget.held("llama")
    on_its_thread(pool, lambda: pool.residents._room.send_cache_away(model))
    assert copying.wait(patience(20)) and model.residence.cache.where is Where.LEAVING
    assert pool.residents.budget.held("llama") == held and pool.host_kv.slabs.used_bytes > 0
    threading.Timer(0.05, may_copy.set).start()
    assert tokens(pool.generate("llama", PROMPTS, GREEDY)) == alone["llama"][0]
    check_nothing_leaked(pool)
    pool.sleep("llama")
    assert pool.residents.budget.held("llama") == 0 and model.residence.cache.where is Where.AWAY
    check_nothing_leaked(pool)


def test_others_answer_while_a_cache_leaves(pool: Pool, alone, monkeypatch):
    """Where there is room for both, nobody waits for the copy."""
    pool.sleep("mistral"), pool.sleep("olmo")
    pool.wake_up("qwen"), pool.wake_up("llama")
    model, may_copy, write = pool.model("llama"), threading.Event(), pool.host_kv.write
    monkeypatch.setattr(pool.host_kv, "write", lambda *args: (may_copy.wait(patience(60)), write(*args)))
    on_its_thread(pool, lambda: pool.residents._room.send_cache_away(model))
    assert tokens(pool.generate("qwen", PROMPTS, GREEDY)) == alone["qwen"][0]
    assert model.residence.cache.where is Where.LEAVING
    may_copy.set()
    assert tokens(pool.generate("llama", PROMPTS, GREEDY)) == alone["llama"][0]


def test_pages_lost_on_their_way_to_the_host_are_computed_again(pool: Pool, alone, monkeypatch):
    long = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    expected, result = tokens(pool.generate("llama", PROMPTS[:2], long)), {}
    engine = pool.llm("llama").engine
    before = engine.accounting.totals.generation_tokens
    thread = threading.Thread(target=lambda: result.update(got=tokens(pool.generate("llama", PROMPTS[:2], long))))
    thread.start()
    while thread.is_alive() and engine.accounting.totals.generation_tokens < before + 4:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(pool.host_kv, "write", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        pool.sleep("llama")
    thread.join(patience(60))
    assert result["got"] == expected and pool.model("llama").residence.cache.rewound >= 1
    check_nothing_leaked(pool)


def test_a_prefix_is_found_after_its_model_was_away(pool: Pool):
    pool.generate("llama", "a prefix of some length", GREEDY)
    for name in ("qwen", "mistral", "olmo"):
        pool.generate(name, "something else", GREEDY)
    pool.sleep("llama")
    assert pool.is_sleeping("llama") and pool.model("llama").residence.cache.num_blocks > 0
    (output,) = pool.generate("llama", "a prefix of some length", GREEDY)
    assert output.num_cached_tokens > 0


def test_what_an_engine_can_do_every_model_of_a_pool_can(pool: Pool, four_models):
    llm = LLM(str(four_models["qwen"]), **ENGINE)
    scored = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1)
    search = BeamSearchParams(beam_width=2, max_tokens=4)
    shaped = SamplingParams(temperature=0.0, max_tokens=8, structured_outputs={"choice": ["yes", "no"]})
    pool.sleep("qwen")
    assert (
        pool.generate("qwen", "abc", scored)[0].outputs[0].logprobs
        == llm.generate("abc", scored)[0].outputs[0].logprobs
    )
    (ours,), (theirs,) = pool.beam_search("qwen", "abc", search), llm.beam_search("abc", search)
    assert [s.tokens for s in ours.sequences] == [s.tokens for s in theirs.sequences]
    assert pool.generate("qwen", "abc", shaped)[0].outputs[0].text in ("yes", "no")
    check_nothing_leaked(pool)


def test_same_shaped_models_share_their_programs(pool: Pool):
    llama, mistral = (pool.llm(name).engine.runner.compiler for name in ("llama", "mistral"))
    assert (llama is mistral) == (pool.llm("llama").model_config == pool.llm("mistral").model_config)


def test_unknown_names_and_models_that_cannot_fit_are_refused(four_models, pool: Pool):
    with pytest.raises(UnknownModel, match="no model 'gpt'"):
        pool.generate("gpt", "x")
    pool.deploy("large", {"path": str(four_models["olmo"]), "kv_cache_memory_bytes": 2 * BUDGET, "aliases": ["big"]})
    with pytest.raises(NoRoom, match=f"{BUDGET} are there"):
        pool.generate("big", "x")
    assert pool.model("large").state == "failed"
    with pytest.raises(ValueError, match="belongs to 'large' already"):
        pool.deploy("other", {"path": "x", "aliases": ["big"]})
    pool.undeploy("large").result(patience(10))
    assert [model.name for model in pool.models] == list(four_models)


def test_a_model_file_that_is_broken_harms_no_other(pool: Pool, tmp_path, alone):
    (tmp_path / "config.json").write_text("{}")
    pool.deploy("broken", str(tmp_path))
    assert tokens(pool.generate("llama", PROMPTS, GREEDY)) == alone["llama"][0]
    with pytest.raises(ValueError):
        pool.generate("broken", "x")
    pool.undeploy("broken").result(patience(10))


def test_update_of_weights_compiles_nothing_and_forgets_prefixes(pool: Pool, four_models, alone, tmp_path):
    from safetensors.numpy import load_file, save_file

    for file in four_models["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: -w if "embed" in name else w for name, w in weights.items()}, tmp_path / "model.safetensors")
    pool.generate("llama", PROMPTS, GREEDY)
    compiled = pool.llm("llama").engine.runner.num_compilations
    pool.update_weights("llama", str(tmp_path))
    changed = pool.generate("llama", PROMPTS, GREEDY)
    assert tokens(changed) == tokens(LLM(str(tmp_path), **ENGINE).generate(PROMPTS, GREEDY))
    assert tokens(changed) != alone["llama"][0] and changed[0].num_cached_tokens == 0
    with pytest.raises(ValueError, match="another kind of model"):
        pool.update_weights("llama", str(four_models["qwen"]))
    pool.update_weights("llama", str(four_models["llama"]))
    assert tokens(pool.generate("llama", PROMPTS, GREEDY)) == alone["llama"][0]
    assert pool.llm("llama").engine.runner.num_compilations == compiled


def test_host_memory_that_is_too_small_for_weights_and_pages(four_models, alone):
    """Weights are read again from disk; requests whose pages find no room begin again, and say the same."""
    models = {name: str(four_models[name]) for name in ("llama", "olmo")}
    small = {"device_memory_bytes": 1_200_000, "host_memory_bytes": 1000, "sleeping_kv_bytes": 40 << 10}
    with Pool(models, kv_slab_bytes=20 << 10, **small, **ENGINE) as pool, ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(pool.generate, name, PROMPTS, GREEDY) for name in [*models] * 3]
        for name, call in zip([*models] * 3, calls, strict=True):
            assert tokens(call.result()) == alone[name][0]
        assert pool.residents.totals.count >= 2
        check_nothing_leaked(pool)
