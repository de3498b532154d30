"""Whoever follows process 0 has what it has: the same programs on the same arrays, the same slabs in host memory."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.checkpoints import open_checkpoint
from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.families import read_config
from jaxllm.kv.host_memory import HostMemory
from jaxllm.kv.offload import add_tiers
from jaxllm.runner.runner import ModelRunner
from jaxllm.runner.shapes import make_memory, runner_shapes
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model
from jaxllm.weights.loader import load_parameters


@pytest.fixture(params=["tp=1", "tp=2"])
def pair(request, tiny_llama, monkeypatch):
    """An engine with a host tier, and a runner that follows its every message."""
    config = EngineConfig(
        model=str(tiny_llama),
        dtype="float32",
        mesh=request.param,
        max_model_len=64,
        max_num_seqs=2,
        page_size=8,
        max_num_batched_tokens=16,
        matmul_backend="xla",
        host_kv_bytes=1 << 20,
    )
    checkpoint = open_checkpoint(tiny_llama)
    placement = Placement(make_mesh(config.mesh), load_rules("megatron"))
    model = make_model(config, read_config(checkpoint.config), placement)
    token = model.cfg.num_layers * model.cfg.num_kv_heads * model.kv_copies * model.cfg.head_dim * 2 * 4
    shapes = runner_shapes(dataclasses.replace(config, kv_cache_memory_bytes=token * 8 * 10), model)
    follower = ModelRunner(model, shapes)
    memory = make_memory(model, shapes, enable_prefix_caching=True, namespace="test")
    leader = ModelRunner(model, shapes, memory, announce=lambda message: assert_going_on(follower.obey(message)))
    params = load_parameters(model, checkpoint)
    leader.start(params)
    follower.start(params)
    add_tiers(memory, config, leader.host_pages(), "test")
    # As on a mesh of several processes: each part of a slab is kept by itself.
    memory.mover._arrays.memory._is_shared = True
    follower._shelf._memory._is_shared = True
    return Engine(leader, memory=memory), follower


def assert_going_on(goes_on: bool) -> None:
    assert goes_on


def generate(engine: Engine, prompts: list[list[int]], **params: float) -> list[list[int]]:
    chosen = SamplingParams(**{"max_tokens": 6, "ignore_eos": True, "temperature": 0.0, **params})
    requests = [engine.add_request(prompt, chosen) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return [request.token_ids[request.num_prompt :] for request in requests]


def test_follower_has_the_same_pages_slots_and_slabs(pair):
    engine, follower = pair
    leader = engine.runner
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 90, 40).tolist() for _ in range(4)]
    first = [generate(engine, [prompt])[0] for prompt in prompts]  # each pushes out what came before
    generate(engine, prompts[:2], temperature=1.0, seed=3)
    assert [generate(engine, [prompt])[0] for prompt in prompts] == first
    assert engine.memory.tiers.stats.host_hits > 0 and engine.memory.tiers.stats.pages_out > 0
    for mine, its in zip(
        jax.tree.leaves((leader.state.pages, leader.state.slots)),
        jax.tree.leaves((follower.state.pages, follower.state.slots)),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))

    held = {slab.number: slab for _, slab in engine.memory.tiers.host.unpinned()}
    assert held and held.keys() <= follower._shelf._parts.keys()
    for number, slab in held.items():
        for mine, its in zip(jax.tree.leaves(slab.parts), jax.tree.leaves(follower._shelf._parts[number]), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(its))


def test_slabs_that_process_0_forgets_are_forgotten_by_all(pair):
    engine, follower = pair
    rng = np.random.default_rng(1)
    for _ in range(3):
        generate(engine, [rng.integers(3, 90, 40).tolist()])
    assert follower._shelf._parts
    engine.memory.tiers.reset()
    engine.memory.mover.reset()
    engine.evict_idle()  # the next slabs say which are gone
    kept = {slab.number for _, slab in engine.memory.tiers.host.unpinned()}
    assert follower._shelf._parts.keys() == kept


@pytest.mark.parametrize("mesh", ["tp=1", "dp=2,tp=2"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_slab_comes_back_as_it_went(mesh, is_shared):
    placement = Placement(make_mesh(mesh), load_rules("megatron"))
    sharding = placement.sharding(None, None, "heads")
    values = np.arange(48.0, dtype=np.float32).reshape(3, 4, 4)
    slab = [jax.device_put(values, sharding), jax.device_put(-values, sharding)]
    memory = HostMemory([jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in slab])
    memory._is_shared = is_shared
    back = memory.up(memory.down(slab))
    for got, sent in zip(back, slab, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(sent))
        assert got.sharding == sent.sharding
    assert memory.copy_rate(2 * values.nbytes) > 0
