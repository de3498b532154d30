"""Meshes over the devices there are, and where arrays lie on them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import ShardingRules, load_rules


def test_mesh_takes_the_first_devices_in_order():
    mesh = make_mesh("dp=2,tp=3")
    assert dict(mesh.shape) == {"dp": 2, "tp": 3}
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()[:6]]


def test_mesh_larger_than_the_devices_is_one_line_that_says_how_to_emulate():
    with pytest.raises(ValueError) as error:
        make_mesh("dp=3,tp=3")
    message = str(error.value)
    assert "\n" not in message
    assert "'dp=3,tp=3' needs 9 devices but there are 8 (cpu)" in message
    assert "JAX_NUM_CPU_DEVICES=9" in message


def test_mesh_beyond_what_can_be_emulated_is_not_said_to_be_emulable():
    with pytest.raises(ValueError, match=r"needs 1000 devices but there are 8 \(cpu\); .* `jaxllm plan`$"):
        make_mesh("tp=1000")


def test_axis_that_the_mesh_lacks_does_not_cut():
    rules = ShardingRules("both", {"heads": "tp", "model_in": "dp"}, {"tokens": "dp"})
    on_tp, on_both = Placement(make_mesh("tp=2"), rules), Placement(make_mesh("dp=2,tp=2"), rules)
    dims = ("model_in", "heads", "head_dim")
    assert on_tp.spec(dims, parameter=True) == PartitionSpec(None, "tp", None)
    assert on_both.spec(dims, parameter=True) == PartitionSpec("dp", "tp", None)
    assert on_both.spec(("tokens", "heads")) == PartitionSpec("dp", None)


def test_array_is_cut_as_the_rules_say():
    placement = Placement(make_mesh("tp=4"), load_rules("megatron"))
    weight = np.arange(32.0).reshape(4, 8)
    cut = jax.device_put(weight, placement.sharding("model_in", "ffn", parameter=True))
    for i, shard in enumerate(cut.addressable_shards):
        np.testing.assert_array_equal(shard.data, weight[:, 2 * i : 2 * i + 2])
    whole = jax.device_put(weight, placement.replicated)
    assert {shard.data.shape for shard in whole.addressable_shards} == {(4, 8)}


def test_activation_constraint_cuts_inside_a_jitted_function_and_keeps_the_values():
    placement = Placement(make_mesh("tp=2"), load_rules("megatron"))
    out = jax.jit(lambda x: placement.shard(x + 1, "tokens", "ffn"))(jnp.zeros((2, 4)))
    assert out.sharding.is_equivalent_to(placement.sharding("tokens", "ffn"), 2)
    assert (np.asarray(out) == 1).all()


def test_heads_are_cut_where_the_rules_and_the_mesh_say():
    assert Placement(make_mesh("tp=2"), load_rules("megatron")).parts("heads") == 2
    assert Placement(make_mesh("dp=2"), load_rules("megatron")).parts("heads") == 1
    assert Placement(make_mesh("tp=2"), load_rules("replicated")).parts("heads") == 1
