"""The product with a quantised matrix against NumPy's with the matrix expanded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.config.quantization import E2M1, Activations, Scheme
from jaxllm.ops.moe import grouped_product
from jaxllm.ops.quantized import QuantizedMatrix
from jaxllm.weights.quantized import Quantized
from jaxllm.weights.rounding import Pieces, round_to_nearest

RNG = np.random.default_rng(0)
SCHEMES = [
    Scheme(codes="uint4", group=32, offset=8),
    Scheme(codes="uint4", group=16, has_minima=True, scale_dtype="float16"),
    Scheme(codes="uint4", group=32, table=E2M1, scale_dtype="float8_e8m0fnu"),
    Scheme(codes="uint4", group=32, offset=8, is_permuted=True),
    Scheme(codes="uint4", offset=8),
    Scheme(codes="int8"),
    Scheme(codes="int8", group=16, has_minima=True),
    Scheme(codes="float8_e4m3fn", group=64),
]


def random_pieces(scheme: Scheme, lead: tuple[int, ...], inputs: int, kept: tuple[int, ...]) -> Pieces:
    shape, axis = (*lead, inputs, *kept), len(lead)
    groups = (*lead, inputs // scheme.group if scheme.group else 1, *kept)
    if scheme.codes == "uint4":
        codes = RNG.integers(0, 16, shape).astype(np.uint8)
    else:
        codes = round_to_nearest(RNG.normal(size=shape).astype(np.float32), Scheme(codes=scheme.codes), axis).codes
    scales = RNG.uniform(0.5, 2, groups).astype(jnp.dtype(scheme.scale_dtype)).astype(np.float32)
    minima = RNG.normal(size=groups).astype(jnp.dtype(scheme.scale_dtype)).astype(np.float32)
    order = RNG.permuted(np.broadcast_to(np.arange(inputs, dtype=np.int32), (*lead, inputs)), axis=-1)
    return Pieces(codes, scales, minima if scheme.has_minima else None, order if scheme.is_permuted else None)


def expanded(pieces: Pieces, scheme: Scheme, axis: int) -> np.ndarray:
    """`[.., K, ..]` with its inputs in their own order."""
    numbers = np.array(scheme.table)[pieces.codes] if scheme.table else pieces.codes.astype(np.float64) - scheme.offset
    times = numbers.shape[axis] // pieces.scales.shape[axis]
    values = numbers * np.repeat(pieces.scales, times, axis)
    if pieces.minima is not None:
        values = values + np.repeat(pieces.minima, times, axis)
    if pieces.order is None:
        return values
    places = np.argsort(pieces.order, axis=-1)
    return np.take_along_axis(values, places.reshape(places.shape + (1,) * (values.ndim - places.ndim)), axis)


def matrix(
    scheme: Scheme, shape: tuple[int, ...], inputs: tuple[int, ...], mesh: int = 1, spec: tuple = ()
) -> tuple[QuantizedMatrix, np.ndarray]:
    """A matrix on a mesh of `tp` devices, and its values as the parameter has them."""
    storage = Quantized(scheme, inputs)
    merged = storage.merged(shape)
    pieces = random_pieces(scheme, merged[: inputs[0]], merged[inputs[0]], merged[inputs[0] + 1 :])

    def read(box: tuple[slice, ...]) -> Pieces:
        lead, kept = box[: inputs[0]], box[inputs[-1] + 1 :]
        inner = merged[inputs[0]] // shape[inputs[0]]
        start, stop = box[inputs[0]].start * inner, box[inputs[0]].stop * inner
        unit = scheme.group or merged[inputs[0]]
        groups = slice(start // unit, max(stop // unit, 1))
        return Pieces(
            pieces.codes[(*lead, slice(start, stop), *kept)],
            pieces.scales[(*lead, groups, *kept)],
            None if pieces.minima is None else pieces.minima[(*lead, groups, *kept)],
            None if pieces.order is None else pieces.order[lead],
        )

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:mesh]), ("tp",)), PartitionSpec(*spec))
    made = storage.from_pieces(jax.ShapeDtypeStruct(shape, jnp.float32), sharding, read)
    assert made.shape == shape
    return made, expanded(pieces, scheme, inputs[0]).reshape(shape)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.name} {scheme.is_permuted}")
def test_product_equals_that_of_the_expanded_matrix(scheme):
    cases = [
        ("TKGH,KGHD->TD", (4, 2, 16, 24), (0, 1, 2)),
        ("TD,DKXH->TKXH", (128, 2, 3, 8), (0,)),
        ("RD,VD->RV", (40, 64), (1,)),
        ("TNR,RNH->TNH", (64, 4, 8), (0,)),
        ("TNH,RNH->TNR", (64, 4, 8), (0,)),
    ]
    for spec, shape, inputs in cases:
        if scheme.is_permuted and inputs == (1,):
            continue  # the rows of a table are no experts
        w, values = matrix(scheme, shape, inputs)
        x = RNG.normal(size=[5 if d == spec[0] else shape[spec.split(",")[1].index(d)] for d in spec.split(",")[0]])
        want = np.einsum(spec, x, values)
        got = jax.jit(lambda w, x, spec=spec: w.product(spec, x))(w, jnp.asarray(x, jnp.float32))
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), err_msg=spec)


@pytest.mark.parametrize("scheme", SCHEMES[:6], ids=lambda scheme: f"{scheme.name} {scheme.is_permuted}")
def test_product_is_the_same_on_two_devices_cut_either_way(scheme):
    for spec, shape, inputs, cut in [
        ("TF,FD->TD", (128, 24), (0,), ("tp", None)),
        ("TF,FD->TD", (128, 24), (0,), (None, "tp")),
        ("TKGH,KGHD->TD", (4, 2, 16, 24), (0, 1, 2), ("tp",)),
    ]:
        w, values = matrix(scheme, shape, inputs, 2, cut)
        x = RNG.normal(size=(5, *shape[: len(inputs)]))
        got = jax.jit(lambda w, x, spec=spec: w.product(spec, x))(w, jnp.asarray(x, jnp.float32))
        want = np.einsum(spec, x, values)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_experts_multiply_their_own_rows_only():
    w, values = matrix(SCHEMES[0], (4, 64, 2, 12), (1,))
    x, sizes = RNG.normal(size=(20, 64)), np.array([3, 0, 9, 5])
    got = jax.jit(lambda x, w, s: grouped_product("MD,DXF->MXF", x, w, s))(jnp.asarray(x, jnp.float32), w, sizes)
    start = 0
    for e, size in enumerate(sizes):
        want = np.einsum("MD,DXF->MXF", x[start : start + size], values[e])
        np.testing.assert_allclose(got[start : start + size], want, atol=1e-4)
        start += size
    assert not np.any(got[start:])


def test_rows_of_a_table_are_those_of_the_expanded_one():
    for scheme in SCHEMES[:3]:
        w, values = matrix(scheme, (40, 64), (1,))
        np.testing.assert_allclose(jax.jit(lambda w, i: w.rows(i))(w, jnp.array([3, 39])), values[[3, 39]], rtol=1e-6)


@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
def test_activations_are_rounded_per_token(codes):
    w, values = matrix(Scheme(codes="int8", activations=Activations(codes=codes)), (64, 24), (0,))
    x = RNG.normal(size=(5, 64)).astype(np.float32)
    x[2] = 0
    limit = {"int8": 127, "float8_e4m3fn": 448}[codes]
    scale = np.maximum(np.abs(x).max(1, keepdims=True), 1e-10) / np.float32(limit)
    rounded = (
        np.clip(np.round(x / scale), -128, 127)
        if codes == "int8"
        else np.asarray(x / scale, jnp.float8_e4m3fn).astype(np.float32)
    )
    got = w.product("TF,FD->TD", jnp.asarray(x))
    np.testing.assert_allclose(got, (rounded * scale) @ values, atol=2e-3)
    assert np.abs(got - x @ values).max() > 0.1


def test_no_matrix_is_expanded_as_a_whole():
    """Temporaries of the compiled product against the bytes of the expanded matrix."""
    for scheme in (SCHEMES[0], SCHEMES[5]):
        w, _ = matrix(scheme, (4096, 4096), (0,))
        x = jnp.ones((4, 4096), jnp.float32)
        compiled = jax.jit(lambda w, x: w.product("TF,FD->TD", x)).lower(w, x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 4096 / 4


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="48 inputs do not divide into groups of 32"):
        round_to_nearest(np.ones((48, 4), np.float32), SCHEMES[0], 0)
