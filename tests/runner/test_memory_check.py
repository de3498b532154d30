"""What does not fit is said before it is allocated: what takes how much, what to lower and to what."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine.build import build_engine
from jaxllm.families.presets import model_config
from jaxllm.runner import memory_check
from jaxllm.runner.memory_check import needed, out_of_memory_explained, problem_of
from jaxllm.runner.shapes import runner_shapes
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model


def parts_of(mesh: str = "tp=1", preset: str = "gpt2", **settings):
    config = EngineConfig(model=preset, mesh=mesh, load_format="dummy", matmul_backend="xla", **settings)
    model = make_model(config, model_config(preset), Placement(make_mesh(mesh), load_rules("megatron")))
    return model, runner_shapes(config, model)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=3", "dp=2,tp=2", "dp=4"])
def test_parts_are_what_the_arrays_take_on_one_device(mesh):
    model, shapes = parts_of(mesh, kv_cache_memory_bytes=64 << 20, max_model_len=256, max_num_seqs=8)
    needs = needed(model, shapes)
    pages = [
        jnp.zeros(s.sharding.shard_shape(s.shape), s.dtype) for s in memory_check.abstract_state(model, shapes).pages
    ]
    assert needs.pages == sum(array.nbytes for array in pages)
    assert needs.slots == (shapes.num_replicas * 8 + 1) * (256 * 4 + 1 + 4 * 4 + 4 * -(-50257 // 32))
    assert needs.weights == pytest.approx(2 * 124_439_808 / model.placement.parts("heads"), rel=0.35)
    assert needs.cache_setting == pytest.approx(64 << 20, rel=0.02)  # less than a page is lost


def test_what_fits_is_no_problem_and_an_unknown_limit_neither():
    needs = needed(*parts_of(kv_cache_memory_bytes=64 << 20))
    assert problem_of(needs, needs.total, "a device") is None
    assert problem_of(needs, None, "a device") is None
    assert problem_of(needs, needs.total - 1, "a device")


@pytest.mark.parametrize("mesh", ["tp=1", "tp=3", "dp=2"])
@pytest.mark.parametrize("name", ["kv_cache_memory_bytes", "max_num_seqs"])
def test_size_that_is_advised_is_enough_and_not_far_below(mesh, name):
    settings = {"kv_cache_memory_bytes": 1 << 30, "max_num_seqs": 20_000, "max_model_len": 1024}
    settings["max_num_batched_tokens"] = 32_768
    needs = needed(*parts_of(mesh, **settings))
    free = needs.total - 100_000_000
    problem = problem_of(needs, free, "a device")
    assert problem is not None and "\n" not in problem
    advised = re.search(rf"{name} (?:by [\d.]+ .B )?to (\d+)", problem)
    assert advised is not None, problem
    lowered = needed(*parts_of(mesh, **settings | {name: int(advised[1])}))
    assert 0.9 * free < lowered.total <= free


def test_weights_that_fill_a_device_call_for_more_devices():
    needs = needed(*parts_of(kv_cache_memory_bytes=64 << 20))
    assert "mesh of more devices" in str(problem_of(needs, needs.weights // 2, "a device"))
    too_tight = dataclasses.replace(needs, least_pages=needs.pages)
    assert "together" in str(problem_of(too_tight, needs.weights + 1000, "a device"))


def test_engine_that_cannot_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory_check, "free_host_bytes", lambda: 600 << 20)
    monkeypatch.setattr("jaxllm.weights.loader.random_parameters", lambda *_: pytest.fail("was allocated"))
    with pytest.raises(ValueError, match=r"^out of memory: the engine takes .*KV cache 2\.\d+ GB.*lower kv_cache_mem"):
        build_engine(EngineConfig(model="gpt2", load_format="dummy", kv_cache_memory_bytes=2 << 30))


def test_failed_allocation_is_explained_and_other_errors_are_not_touched():
    model, shapes = parts_of(kv_cache_memory_bytes=1 << 30)
    for error in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 100000000 bytes."),
        MemoryError("Unable to allocate"),
    ):
        advice = r"^out of memory: .* lower kv_cache_memory_bytes"
        with pytest.raises(ValueError, match=advice), out_of_memory_explained(model, shapes):
            raise error
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), out_of_memory_explained(model, shapes):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_containers_limit_counts_without_files_that_can_be_dropped(tmp_path):
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_check._container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory_check._container(tmp_path) == 400
    assert memory_check._container(tmp_path / "nothing") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:      3 kB\n")
    assert memory_check._available(tmp_path / "meminfo") == 3072
