"""Quantised products on a TPU: one product for each group, and no expanded matrix in the compiled program."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.config.quantization import E2M1, Scheme
from jaxllm.deployment.topology import prepare_environment
from jaxllm.families.presets import preset
from jaxllm.ops import quantized
from jaxllm.ops.quantized import QuantizedMatrix
from jaxllm.runner.programs import lower
from jaxllm.runner.shapes import runner_shapes
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(codes="uint4", group=32, has_minima=True),
        Scheme(codes="uint4", offset=8),
        Scheme(codes="uint4", group=64, table=E2M1),
    ],
    ids=["minima", "per-channel", "table"],
)
def test_group_by_group_is_the_product(scheme):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 256, (64, 2, 24), np.uint8))
    scales, minima = (
        jnp.asarray(rng.random((128 // (scheme.group or 128), 2, 24)), scheme.scale_dtype) for _ in range(2)
    )
    matrix = QuantizedMatrix(
        codes, scales, minima if scheme.has_minima else None, None, None, scheme, 0, dtype="float32"
    )
    x = jnp.asarray(rng.standard_normal((3, 5, 128)), jnp.float32)
    want = np.asarray(matrix.product("ABD,DXF->ABXF", x))
    np.testing.assert_allclose(
        np.asarray(quantized._by_groups(x, matrix)), want, atol=1e-5 * np.abs(want).max(), rtol=0
    )


@pytest.mark.optimized
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_decode_with_int4_weights_compiles_for_a_v5e_without_expanding_them():
    pytest.importorskip("libtpu")
    prepare_environment()
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4), ("tp",))
    cfg = dataclasses.replace(preset("llama-3.1-8b"), num_layers=1, vocab_size=1024)
    config = EngineConfig(
        mesh="tp=4", max_model_len=1024, kv_cache_memory_bytes=64 << 20, load_format="dummy", quantization="int4"
    )
    model = make_model(config, cfg, Placement(mesh, load_rules("megatron")))
    program = lower(model, runner_shapes(config, model), ("decode_greedy", 8)).compile()
    assert program.memory_analysis().temp_size_in_bytes < model.parameter_bytes_per_device() / 4
