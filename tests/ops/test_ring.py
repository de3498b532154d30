"""Ring attention on an emulated ring equals a dense float64 softmax, whatever crosses the borders of the pieces."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxllm.kv.memory import write_pages
from jaxllm.ops.attention import AttentionSpec, RaggedRows
from jaxllm.ops.attention.ring import RingBatch, ring_attention, zigzag

K, G, H, C, M, T = 2, 3, 8, 4, 24, 48
Q_LEN = (1, 1, 29, 0, 9)  # two decodes, a chunk over several pieces, an empty row; 8 tokens of padding follow
KV_LEN = (40, 1, 64, 0, 13)  # before it: 39, 0, 35, 0 and 4 keys in the cache


def dense(q_KGH: np.ndarray, kv_L2KH: np.ndarray, spec: AttentionSpec, sinks: Any) -> np.ndarray:
    values_width = spec.value_width or kv_L2KH.shape[-1]
    scores = np.einsum("KGH,SKH->KGS", q_KGH, kv_L2KH[:, 0], dtype=np.float64) * spec.scale
    if spec.softcap:
        scores = spec.softcap * np.tanh(scores / spec.softcap)
    if spec.window:
        scores[..., : max(0, scores.shape[-1] - spec.window)] = -np.inf
    weights = np.exp(scores)
    total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks))
    return np.einsum("KGS,SKH->KGH", weights / total[..., None], kv_L2KH[:, -1, :, :values_width])


def run(spec: AttentionSpec, sinks: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of the real tokens, from the ring and from the dense reference."""
    rng = np.random.default_rng(5)
    halves, k, g = (1, 1, K * G) if spec.value_width else (2, K, G)
    num_rows = len(Q_LEN)
    table = 1 + rng.permutation(num_rows * M).reshape(num_rows, M).astype(np.int32)
    pages = rng.normal(size=(1 + num_rows * M, halves, C, k, H)).astype(np.float32) * 50
    q = rng.normal(size=(T, k, g, H)).astype(np.float32)
    kv_new = rng.normal(size=(T, halves, k, H)).astype(np.float32)
    token_row, position, slots = np.full(T, -1, np.int32), np.zeros(T, np.int32), np.zeros(T, np.int32)
    expected, start = np.zeros((T, k, g, spec.value_width or H)), 0
    for row, (num, length) in enumerate(zip(Q_LEN, KV_LEN, strict=True)):
        kv = rng.normal(size=(length, halves, k, H)).astype(np.float32)
        kv[length - num :] = kv_new[start : start + num]
        for p in range(length - num):
            pages[table[row, p // C], :, p % C] = kv[p]
        for i in range(num):
            p, t = length - num + i, start + i
            token_row[t], position[t], slots[t] = row, p, table[row, p // C] * C + p % C
            expected[t] = dense(q[t], kv[: p + 1], spec, sinks)
        start += num
    starts = np.cumsum(Q_LEN) - Q_LEN
    ints = (np.asarray(a, np.int32) for a in (starts, Q_LEN, KV_LEN))
    order = zigzag(T, size)
    batch = RingBatch(RaggedRows(*ints, jnp.int32(2), table), token_row[order], position[order])  # type: ignore[arg-type]
    local = functools.partial(
        ring_attention,
        write=write_pages,
        axis="cp",
        size=size,
        spec=spec,
        sinks_KG=sinks,  # type: ignore[arg-type]
    )
    cut, whole = PartitionSpec("cp"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:size]), ("cp",))
    ring = jax.shard_map(
        local, mesh=mesh, in_specs=(cut, cut, whole, whole, whole), out_specs=(cut, whole), check_vma=False
    )
    kv = kv_new.transpose(0, 2, 1, 3)
    out, written = jax.jit(ring)(q[order], kv[order], pages, slots[order], batch)
    back = np.asarray(out)[np.argsort(order)]
    flat = np.asarray(written).transpose(0, 2, 1, 3, 4).reshape(-1, halves, k, H)
    np.testing.assert_array_equal(flat[slots[:start]], kv_new[:start], "every device writes what passes")
    assert not back[start:].any(), "padding gives zeros"
    return back[:start], expected[:start]


@pytest.mark.parametrize(
    ("size", "spec", "with_sinks"),
    [
        (4, AttentionSpec(scale=0.4), False),
        (2, AttentionSpec(scale=0.4, window=7, softcap=2.0), True),
        (4, AttentionSpec(scale=0.4, window=30), False),
        (2, AttentionSpec(scale=0.4, value_width=6), True),
    ],
)
def test_ring_equals_a_dense_reference(size: int, spec: AttentionSpec, with_sinks: bool) -> None:
    shape = (1, K * G) if spec.value_width else (K, G)
    sinks = np.random.default_rng(9).normal(size=shape).astype(np.float32) if with_sinks else None
    got, expected = run(spec, sinks, size)
    np.testing.assert_allclose(got, expected, atol=3e-5)


def test_zigzag_gives_every_device_an_early_and_a_late_piece() -> None:
    assert zigzag(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert zigzag(8, 2, 2).tolist() == [0, 3, 1, 2, 4, 7, 5, 6]
    pairs = [sum(i + 1 for i in part) for part in zigzag(64, 4).reshape(4, -1).tolist()]
    assert len(set(pairs)) == 1, "all devices have the same number of (query, key) pairs"
