"""A quantised parameter in panels has the numbers of the same parameter in its own order, box by box."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.config.quantization import Activations, Scheme
from jaxllm.ops.cpu import ffi
from jaxllm.ops.cpu.quantized import QuantizedPanels
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.quantized_panels import QuantizedInPanels
from jaxllm.weights.rounding import Pieces
from jaxllm.weights.schemes import with_activations

if reason := ffi.unavailable():
    pytest.skip(reason, allow_module_level=True)

WITH_MINIMA = Scheme(codes="uint4", group=32, has_minima=True, scale_dtype="float16")
ORDERED = Scheme(codes="uint4", group=32, offset=8, is_permuted=True, scale_dtype="bfloat16")
BYTES = Scheme(codes="int8")


def pieces_of(storage: Quantized, shape: tuple[int, ...]) -> Pieces:
    rng, s = np.random.default_rng(0), storage.scheme
    merged, groups = storage.merged(shape), storage.scale_shape(shape)
    codes = rng.integers(0, 16, merged, np.uint8) if s.bits == 4 else rng.integers(-127, 128, merged, np.int8)
    scales, minima = (rng.random(groups).astype(jnp.dtype(s.scale_dtype)) for _ in range(2))
    order = None
    if s.is_permuted:
        lead = merged[: storage.axis]
        order = np.stack([rng.permutation(merged[storage.axis]) for _ in range(max(1, int(np.prod(lead))))])
        order = order.reshape(*lead, -1).astype(np.int32)
    return Pieces(codes, scales, minima if s.has_minima else None, order)


@pytest.mark.parametrize(
    ("shape", "inputs", "contracted", "spec", "x_shape"),
    [
        ((64, 2, 2048), (0,), (0,), "TD,DXF->TXF", (3, 64)),
        ((2, 2, 16, 96), (0, 1, 2), (0, 1, 2), "TKGH,KGHD->TD", (3, 2, 2, 16)),
        ((160, 64), (1,), (1,), "TD,VD->TV", (3, 64)),
    ],
)
@pytest.mark.parametrize("scheme", [WITH_MINIMA, ORDERED, BYTES], ids=["minima", "order", "int8"])
def test_matrix_in_panels_is_the_matrix(shape, inputs, contracted, spec, x_shape, scheme):
    if scheme.is_permuted and inputs == (1,):
        pytest.skip("a table's inputs have no order")
    logical = Quantized(scheme, inputs)
    storage, want = QuantizedInPanels(logical), jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32))
    assert storage.fits(want, contracted)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
    pieces, axis, num = pieces_of(logical, shape), storage.axis, len(inputs)

    def read(box):
        box = (*box[:axis], slice(None), *box[axis + num :])
        cut = [None if part is None else part[box] for part in (pieces.codes, pieces.scales, pieces.minima)]
        return Pieces(*cut, pieces.order)

    packed, plain = (s.from_pieces(want, sharding, read) for s in (storage, logical))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), storage.abstract(want, sharding)) == jax.tree.map(
        lambda a: (a.shape, a.dtype), packed
    )
    x = jax.random.normal(jax.random.key(0), x_shape)
    both = [np.asarray(jax.jit(lambda x, w: w.product(spec, x))(x, w)) for w in (packed, plain)]
    np.testing.assert_allclose(*both, rtol=0, atol=2e-6 * np.abs(both[1]).max())


def test_experts_in_panels_are_the_experts():
    shape, logical = (3, 64, 2, 32), Quantized(WITH_MINIMA, (1,))
    storage, want = QuantizedInPanels(logical), jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32))
    assert storage.fits(want, ())
    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec())
    pieces = pieces_of(logical, shape)

    def read(box):
        return Pieces(pieces.codes[box], *(part[box[0], :, *box[2:]] for part in (pieces.scales, pieces.minima)))

    packed, plain = (s.from_pieces(want, sharding, read) for s in (storage, logical))
    assert packed.shape == plain.shape == shape
    x = jax.random.normal(jax.random.key(0), (4, 64))
    for number in range(3):
        both = [np.asarray(w.expert(jnp.int32(number)).product("MD,DXF->MXF", x)) for w in (packed, plain)]
        np.testing.assert_allclose(*both, rtol=0, atol=2e-6 * np.abs(both[1]).max())


def test_what_the_kernels_do_not_know_stays_as_it_is():
    want = jax.ShapeDtypeStruct((64, 64), jnp.dtype(jnp.bfloat16))
    assert QuantizedInPanels(Quantized(BYTES, (0,))).fits(want, (0,))
    assert not QuantizedInPanels(Quantized(Scheme(codes="float8_e4m3fn"), (0,))).fits(want, (0,))
    assert not QuantizedInPanels(Quantized(dataclasses.replace(BYTES, offset=3), (0,))).fits(want, (0,))
    assert not QuantizedInPanels(Quantized(BYTES, (0,))).fits(want, ())  # absorbed products sum over other dims


def test_activations_are_rounded_where_asked_for_and_possible(tiny_llama):
    with pytest.raises(ValueError, match="activation_dtype='int8' is for matrices of 4-bit or 8-bit integers"):
        LLM(str(tiny_llama), activation_dtype="int8")
    schemes = with_activations({("a",): WITH_MINIMA, ("b",): Scheme(codes="float8_e4m3fn")}, "int8")
    assert schemes["a",].activations == Activations(codes="int8", by_group=True)
    assert schemes["b",].activations is None
    storage = QuantizedInPanels(Quantized(schemes["a",], (0,)))
    assert storage.fits(jax.ShapeDtypeStruct((64, 64), jnp.dtype(jnp.bfloat16)), (0,))


def test_engine_in_quantised_panels_gives_the_logprobs_of_the_engine_without(tiny_llama):
    prompts = [{"prompt_token_ids": np.random.default_rng(n).integers(0, 256, n).tolist()} for n in (3, 40)]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    seen = {}
    for backend in ("xla", "llvm"):
        llm = LLM(
            str(tiny_llama),
            dtype="float32",
            quantization="int4",
            matmul_backend=backend,
            max_model_len=128,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            kv_cache_memory_bytes=1 << 20,
        )
        kept = jax.tree.leaves(llm.engine.runner.model.parameters, is_leaf=lambda x: isinstance(x, QuantizedPanels))
        assert any(isinstance(value, QuantizedPanels) for value in kept) == (backend == "llvm")
        seen[backend] = [
            entry[token].logprob
            for output in llm.generate(prompts, params)
            for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
    np.testing.assert_allclose(seen["llvm"], seen["xla"], atol=2e-4, rtol=0)
    assert len(set(seen["llvm"])) > 30
