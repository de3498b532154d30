"""The plain books of a pool: budget, regions, slabs, and what its files say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.pool.budget import Budget
from jaxllm.pool.config import ModelEntry, PoolConfig, read_models, seconds
from jaxllm.pool.host_kv import HostKV
from jaxllm.pool.regions import Regions
from jaxllm.pool.slabs import Slabs

SIZES = st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), max_size=60)


@given(SIZES)
def test_regions_never_overlap_and_join_again(actions):
    regions, taken = Regions(64 * 256), {}
    for frees, size in actions:
        if frees and taken:
            regions.free(taken.popitem()[0])
        elif (offset := regions.allocate(size)) is not None:
            assert offset % 64 == 0 and offset + size <= regions.size
            assert all(offset + size <= other or other + length <= offset for other, length in taken.items())
            taken[offset] = size
    for offset in taken:
        regions.free(offset)
    assert regions.used == 0 and regions.allocate(64 * 256) == 0


@given(st.lists(st.tuples(st.sampled_from([100, 256, 300]), st.integers(0, 9), st.booleans()), max_size=60))
def test_slabs_have_one_shape_each_and_are_reclaimed(actions):
    slabs, held = Slabs(6, 1000), []
    for block_bytes, count, frees in actions:
        if frees and held:
            slabs.free(held.pop(0))
        elif (blocks := slabs.allocate(block_bytes, block_bytes, count)) is not None:
            assert len({*blocks}) == count and all(b.offset + b.num_bytes <= 1000 for b in blocks)
            held.append(blocks)
        slabs.check()
        sizes = {}
        for block in (block for blocks in held for block in blocks):
            assert sizes.setdefault(block.slab, block.num_bytes) == block.num_bytes, "one shape a slab"
    for blocks in held:
        slabs.free(blocks)
    slabs.check()
    assert slabs.num_used == 0 and len(slabs.allocate("any", 1000, 6)) == 6


def test_pages_come_back_from_the_host_as_they_were():
    memory = HostKV(4096, 1024)
    page = {"a": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "b": np.arange(7, dtype=np.int8)}
    blocks = memory.slabs.allocate("page", 103, 3)
    for i, block in enumerate(blocks):
        memory.write(block, {"a": page["a"] + i, "b": page["b"] + i})
    for i, block in enumerate(blocks):
        found = memory.read(block, page)
        assert (found["a"] == page["a"] + i).all() and (found["b"] == page["b"] + i).all()


def test_a_budget_is_never_exceeded_and_knows_its_peak():
    budget = Budget(100)
    budget.take("a", "weights", 60)
    with pytest.raises(AssertionError, match="50 bytes for b's cache, 40 of 100 are free"):
        budget.take("b", "cache", 50)
    budget.give_back("a", "weights"), budget.give_back("a", "weights")
    assert (budget.used, budget.free, budget.peak, budget.held("a")) == (0, 100, 60, 0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("5m", 300), ("1h30m", 5400), ("250ms", 0.25), (0, 0), ("0", 0), (12.5, 12.5), (-1, math.inf), ("-1m", math.inf)],
)
def test_durations_are_ollamas(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["soon", "5 minutes", "", "m5", True, "nan"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="keep_alive"):
        seconds(text)


def test_a_file_names_models_with_the_engines_own_fields(tmp_path):
    file = tmp_path / "pool.toml"
    file.write_text(
        '[pool]\nkeep_alive = "1m"\n[models.a]\npath = "x"\naliases = ["b"]\npinned = true\nmax_num_seqs = 3\n'
        '[models.c]\npath = "y"\nkeep_alive = -1\n'
    )
    settings, (a, c) = read_models([str(file)], {"max_model_len": 64, "max_num_seqs": 2})
    assert settings == {"keep_alive": "1m"} and a.aliases == ("b",) and a.pinned and c.keep_alive == -1
    assert (a.engine_config().max_num_seqs, c.engine_config().max_num_seqs) == (3, 2)
    assert a.engine_config().max_model_len == 64 and a.engine_config().model == "x"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["a"], "give NAME=PATH pairs"),
        (["a=x", "a=y"], "names 'a' twice"),
        (["missing.toml"], "cannot read missing.toml"),
        ({}, "at least one model"),
        ({"a": {"pinned": True}}, "give its path"),
        ({"a": {"path": "x", "max_model": 3}}, "model 'a': unknown engine argument 'max_model'"),
        ({"a": {"path": "x", "num_processes": 2}}, "a pool is one process"),
        ({"a": {"path": "x", "lora_modules": ["b"]}}, "give a table of names and folders"),
        ({"a": {"path": "x", "lora_modules": {"b": "y"}}, "b": "z"}, "'b' belongs to 'a' already"),
        ({"a": {"path": "x", "aliases": ["b"]}, "b": "y"}, "'b' belongs to 'a' already"),
        ({"a b": "x"}, "is no name for a model"),
        ({"a": {"path": "x", "keep_alive": "soon"}}, "keep_alive='soon'"),
        ({"a": {"path": "x", "pinned": 1}}, "pinned is true or false"),
    ],
)
def test_wrong_models_are_refused_in_one_line(given, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_models(given)
    assert "\n" not in str(caught.value)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="sleeping_kv_bytes=0"):
        PoolConfig(sleeping_kv_bytes=0)
    with pytest.raises(ValueError, match="kv_slab_bytes=100 is above sleeping_kv_bytes=10"):
        PoolConfig(sleeping_kv_bytes=10, kv_slab_bytes=100)
    assert ModelEntry.of("a", "x", {}).path == "x"
