"""The TPU path: programs compile ahead of time for a chip that is not there, and interleaved pages change no token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from jaxllm.config import EngineConfig
from jaxllm.deployment.topology import prepare_environment
from jaxllm.families.presets import preset
from jaxllm.kv.memory import write_pages
from jaxllm.ops.attention import (
    XLA,
    AttentionBackend,
    AttentionSpec,
    RaggedRows,
    SingleRows,
    attention,
    fit_backend,
    pallas_tpu,
    ragged_paged_attention,
    select,
)
from jaxllm.runner.programs import lower
from jaxllm.runner.shapes import runner_shapes
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu")
    prepare_environment()
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:2x2", "tpu").devices


# Programs compiled for devices that are not there go into the compilation cache, but cannot be read back from it.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
@pytest.mark.parametrize("name", ["ragged", "decode_greedy"])
def test_programs_with_the_kernel_compile_for_a_v5e(v5e, name):
    mesh = jax.sharding.Mesh(np.array(v5e).reshape(4), ("tp",))
    cfg = dataclasses.replace(preset("llama-3.1-8b"), num_layers=1, vocab_size=1024)
    config = EngineConfig(mesh="tp=4", max_model_len=1024, kv_cache_memory_bytes=64 << 20, load_format="dummy")
    model = make_model(config, cfg, Placement(mesh, load_rules("megatron")))
    shapes = runner_shapes(config, model)
    assert shapes.attention == AttentionBackend("pallas_tpu") and shapes.kv_dtype == jnp.bfloat16
    key = (name, {"ragged": 64, "decode_greedy": 32}[name])
    program = lower(model, shapes, key).compile()
    assert "tpu_custom_call" in program.as_text()


def test_interleaved_pages_give_the_same_attention():
    rng = np.random.default_rng(0)
    kv_TK2H = jnp.asarray(rng.standard_normal((20, 2, 2, 8), np.float32))
    q = jnp.asarray(rng.standard_normal((20, 2, 3, 8), np.float32))
    slots = jnp.arange(8, 28)
    rows = RaggedRows(*(jnp.asarray(x, jnp.int32) for x in ([0], [20], [20], 0, [[2, 3, 4, 5, 6]])))
    attend = jax.jit(lambda pages: ragged_paged_attention(q, pages, rows, spec=AttentionSpec(scale=0.3)))
    split, interleaved = jnp.zeros((8, 2, 4, 2, 8)), jnp.zeros((8, 4, 4, 8))
    np.testing.assert_allclose(
        attend(write_pages(interleaved, kv_TK2H, slots)), attend(write_pages(split, kv_TK2H, slots)), atol=1e-6
    )


@pytest.mark.parametrize("kind", ["ragged", "decode"])
def test_rows_reach_the_kernel_as_it_means_them(kind, monkeypatch):
    """JAX's own reference in the kernel's place (the kernel itself does not run interpreted)."""
    rng, spec = np.random.default_rng(1), AttentionSpec(scale=0.1, window=30, softcap=20.0)

    def reference(q, pages, *rows, num_kv_pages_per_block, num_queries_per_block, **options):
        out = ref_ragged_paged_attention(q, pages, *rows, **options)
        return jnp.pad(out, ((0, len(q) - len(out)), (0, 0), (0, 0)), constant_values=7.0)

    monkeypatch.setattr(pallas_tpu, "ragged_paged_attention", reference)
    table = jnp.asarray(1 + rng.permutation(60).reshape(6, 10), jnp.int32)
    pages = jnp.asarray(rng.standard_normal((61, 4, 4, 8), np.float32))
    if kind == "ragged":
        rows: Any = RaggedRows(
            *(
                jnp.asarray(x, jnp.int32)
                for x in ([0, 1, 2, 9, 0, 0], [1, 1, 7, 3, 0, 0], [33, 1, 40, 3, 0, 0], 2, table)
            )
        )
    else:
        rows = SingleRows(jnp.asarray([33, 0, 1, 40, 0, 5], jnp.int32), table)
    q = jnp.asarray(rng.standard_normal((16 if kind == "ragged" else 6, 2, 3, 8), np.float32))
    got = pallas_tpu.attention(q, pages, rows, spec=spec)
    np.testing.assert_allclose(got, attention(q, pages, rows, spec=spec, backend=XLA), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "dtype", "reason"),
    [
        ("llama-3.1-8b", "int8", "cache with scales"),
        ("deepseek-v3", "bfloat16", "latent"),
        ("gpt2", "bfloat16", "head width 64"),
    ],
)
def test_a_model_that_the_kernel_cannot_serve_falls_back_and_says_so_once(model, dtype, reason, caplog):
    select._say_once.cache_clear()  # another test may have said it
    cfg = preset(model)
    for _ in range(2):
        assert fit_backend(AttentionBackend("pallas_tpu"), cfg, jnp.dtype(dtype), cfg.num_kv_heads) is XLA
    assert len([r for r in caplog.records if reason in r.message and "falls back" in r.message]) == 1
