"""Matrices in panels are made piece by piece, and equal what packing them whole gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.ops.cpu.packed import PANEL, pack
from jaxllm.weights import boxes
from jaxllm.weights.stored import Panels

SHAPES = [
    ((64, 3, 5, 32), (0,)),
    ((3, 2, 16, 96), (0, 1, 2)),
    ((64, 2, 160), (0,)),
    ((192, 64), (1,)),
    ((48, 128), (0,)),
    ((16, 4, 3, 24), (0,)),
    ((64, 5, 1, 32), (0,)),
    ((2, 32), (0,)),
    ((16, 3, 7, 64), (0,)),
]


@pytest.mark.parametrize(("shape", "contracted"), SHAPES)
@pytest.mark.parametrize("piece_bytes", [1, 4096, 1 << 20])
def test_pieces_make_the_same_panels_as_the_whole(monkeypatch, shape, contracted, piece_bytes):
    monkeypatch.setattr(boxes, "_PIECE_BYTES", piece_bytes)
    matrix = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    largest = 0

    def read(box):
        nonlocal largest
        piece = matrix[box]
        largest = max(largest, piece.size)
        return piece

    sharding = jax.sharding.NamedSharding(jax.make_mesh((1,), ("tp",)), jax.sharding.PartitionSpec())
    want = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    made = Panels(contracted).from_pieces(want, sharding, read)
    assert np.array_equal(np.asarray(made.panels), pack(matrix, contracted))
    like = Panels(contracted).abstract(want, sharding)
    assert jax.tree.structure(like) == jax.tree.structure(made) and like.panels.shape == made.panels.shape
    columns = matrix.size // np.prod([shape[i] for i in contracted])
    if piece_bytes == 1 and shape[-1] % PANEL == 0 and columns > PANEL:
        assert largest < matrix.size  # never whole beside its panels
