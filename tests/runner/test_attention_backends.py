"""Engines whose attention or cache is not the default: the same tokens from the kernel, consistent ones from 8 bits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.kv.layout import token_bytes
from jaxllm.kv.memory import write_pages
from jaxllm.ops.attention import AttentionSpec, QuantizedPages, RaggedRows, choose_backend, ragged_paged_attention
from jaxllm.ops.attention.kv import dequantize, quantize
from jaxllm.ops.cpu import ffi

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
SIZES: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "page_size": 8,
    "kv_cache_memory_bytes": 1 << 20,
}


def tokens(folder, **kwargs: Any) -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 256, 20).tolist()
    prompts = [rng.integers(0, 256, n).tolist() for n in (1, 33)] + [[*shared, 1], [*shared, 2]]
    llm = LLM(str(folder), **SIZES | kwargs)
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    first = [o.outputs[0].token_ids for o in llm.generate(given, GREEDY)]
    again = [o.outputs[0].token_ids for o in llm.generate(given, GREEDY)]  # from cached prefixes
    assert first == again
    assert len({tuple(x) for x in first}) == len(prompts)
    return first


def test_engine_on_the_gpu_kernel_gives_the_tokens_of_the_oracle_under_a_mesh(tiny_llama):
    assert tokens(tiny_llama, mesh="tp=2", attention_backend="pallas_gpu") == tokens(tiny_llama)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_tokens_of_an_8_bit_cache_depend_on_no_chunk_page_or_mesh(tiny_llama, kv_dtype):
    want = tokens(tiny_llama, kv_dtype=kv_dtype)
    other = {"max_num_batched_tokens": 32, "page_size": 16, "mesh": "tp=2"}
    assert tokens(tiny_llama, kv_dtype=kv_dtype, **other) == want


def test_8_bit_cache_holds_nearly_twice_the_tokens_of_bfloat16(tiny_llama):
    pages = [LLM(str(tiny_llama), **SIZES | {"kv_dtype": d}).engine.pool.num_pages for d in ("bfloat16", "int8")]
    assert pages[1] / pages[0] == pytest.approx(2 * 16 / (16 + 2), rel=0.01)  # 16 numbers and a scale of 2 bytes


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_numbers_are_within_half_a_step_of_what_they_stand_for(dtype):
    x = jax.random.normal(jax.random.key(0), (50, 3, 64)) * jnp.geomspace(1e-4, 1e4, 50)[:, None, None]
    error = jnp.abs(dequantize(*quantize(x, dtype)) - x)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    step = largest / 127 if dtype == jnp.int8 else jnp.maximum(jnp.abs(x) / 8, largest / 448 * 2**-9)
    assert bool(jnp.all(error <= step * 0.51))
    assert not dequantize(*quantize(jnp.zeros((2, 64)), dtype)).any()


def test_quantised_pages_move_as_a_tree():
    """What copies or moves pages needs to know no more than that every leaf is page-major."""
    rng = np.random.default_rng(1)
    kv_TK2H = jnp.asarray(rng.standard_normal((12, 2, 2, 16), np.float32))
    empty = QuantizedPages(jnp.zeros((9, 2, 4, 2, 16), jnp.int8), jnp.zeros((9, 2, 4, 2), jnp.bfloat16))
    write = jax.jit(write_pages)
    pages = write(empty, kv_TK2H, jnp.arange(4, 16))  # pages 1, 2, 3
    moved = jax.tree.map(lambda leaf: leaf.at[jnp.array([6, 4, 8])].set(leaf[jnp.array([1, 2, 3])]), pages)
    q, spec = jnp.asarray(rng.standard_normal((1, 2, 1, 16), np.float32)), AttentionSpec(scale=0.25)

    run = jax.jit(lambda pages, rows: ragged_paged_attention(q, pages, rows, spec=spec))

    def attend(pages: Any, *table: int) -> jax.Array:
        return run(pages, RaggedRows(*(np.asarray(x, np.int32) for x in ([0], [1], [12], 1, [table]))))  # type: ignore[arg-type]

    np.testing.assert_array_equal(attend(moved, 6, 4, 8), attend(pages, 1, 2, 3))
    exact = write(jnp.zeros((9, 2, 4, 2, 16)), kv_TK2H, jnp.arange(4, 16))
    np.testing.assert_allclose(attend(pages, 1, 2, 3), attend(exact, 1, 2, 3), atol=0.02)


def test_exact_bytes_of_a_cached_token(tiny_llama):
    cfg = LLM(str(tiny_llama), **SIZES).engine.runner.model.cfg
    numbers = 2 * 2 * 2 * 16  # layers, keys and values, heads, width
    assert token_bytes(cfg, jnp.dtype(jnp.bfloat16), 1) == 2 * numbers
    assert token_bytes(cfg, jnp.dtype(jnp.int8), 1) == numbers + numbers // 16 * 2


def test_platform_picks_the_kernel_and_what_cannot_run_is_refused():
    names = {platform: choose_backend("auto", platform).name for platform in ("cpu", "gpu", "tpu")}
    assert names == {"cpu": "xla" if ffi.unavailable() else "llvm", "gpu": "pallas_gpu", "tpu": "pallas_tpu"}
    with pytest.raises(ValueError, match="does not run on cpu; use auto or xla"):
        choose_backend("pallas_tpu", "cpu")
    with pytest.raises(ValueError, match="attention_backend='flash' is not supported"):
        LLM("x", attention_backend="flash")
