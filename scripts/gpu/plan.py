"""What a GPU check runs: sizes of the model and of its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}
Rows = Iterator[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run: sizes of the model and of its batches. Points stand in the order of their worth."""

    model: dict[str, Any]
    decode: list[tuple[int, int]]  # rows, context
    prefill: list[int]
    peer_decode: list[tuple[int, int]]
    num_kernel_shapes: int
    page_size: int
    steps: int


FULL = Plan(
    model=LLAMA_8B,
    decode=[(b, c) for c in (2048, 128, 8192) for b in (1, 8, 32, 128)],
    prefill=[2048, 512, 8192],
    peer_decode=[(8, 2048), (1, 128), (32, 2048), (32, 128), (1, 2048), (1, 8192)],
    num_kernel_shapes=64,
    page_size=16,
    steps=8,
)
SMALL = Plan(
    model=TINY,
    decode=[(1, 32), (2, 64)],
    prefill=[32],
    peer_decode=[(2, 16)],
    num_kernel_shapes=1,
    page_size=16,
    steps=2,
)
