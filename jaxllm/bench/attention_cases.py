"""Random batches for comparing attention implementations: shapes of real models, mixed rows, every option.

A seed -> one layer's queries, pages, rows, spec and sinks. Places of the cache that no row owns hold large numbers, so
that reading them shows. Knows nothing of implementations.

Dimension letters: T tokens, R rows, K key/value heads, G query heads per key/value head, H head width, P pages,
C tokens per page, M pages per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.ops.attention import AttentionSpec, QuantizedPages, RaggedRows
from jaxllm.ops.attention.kv import SCALE_DTYPE, is_quantized, quantize

LONGEST = 3000
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Everything static of a case."""

    tokens: int
    rows: int
    page_size: int
    kv_heads: int
    group: int
    width: int
    dtype: Any
    longest: int
    spec: AttentionSpec
    sinks: bool

    @property
    def pages_per_row(self) -> int:
        """Width of the page table."""
        return -(-self.longest // self.page_size)

    def __str__(self) -> str:
        spec, dtype = self.spec, jnp.dtype(self.dtype).name
        extras = [
            f"window={spec.window}" if spec.window else "",
            f"cap={spec.softcap}" if spec.softcap else "",
            "sinks" if self.sinks else "",
            "latent" if spec.value_width else "",
        ]
        return " ".join(
            filter(None, (f"C{self.page_size} K{self.kv_heads} G{self.group} H{self.width} {dtype}", *extras))
        )


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of one call of attention."""

    q: jax.Array
    pages: Any
    rows: RaggedRows
    sinks: jax.Array | None


def random_shape(seed: int, dtypes: tuple[Any, ...] = DTYPES) -> Shape:
    """Static sizes: one in eight is a latent cache."""
    rng = np.random.default_rng(seed)
    latent = seed % 8 == 7
    width = int(rng.choice([80, 576])) if latent else int(rng.choice([64, 80, 96, 128, 256]))
    window = int(rng.choice([1, 17, 100, 1024])) if rng.random() < 0.4 and not latent else None
    return Shape(
        tokens=int(rng.choice([1, 16, 48, 150])),
        rows=int(rng.integers(1, 7)),
        page_size=int(rng.choice([8, 16, 32, 64])),
        kv_heads=1 if latent else int(rng.integers(1, 4)),
        group=int(rng.choice([1, 2, 3, 4, 5, 8, 16])),
        width=width,
        dtype=dtypes[seed % len(dtypes)],
        longest=int(rng.choice([70, 600, LONGEST])),
        spec=AttentionSpec(
            scale=width**-0.5,
            window=window,
            softcap=30.0 if rng.random() < 0.25 else None,
            value_width=width - width % 64 if latent else None,
        ),
        sinks=bool(rng.random() < 0.3) and not latent,
    )


def random_case(shape: Shape, seed: int) -> Case:
    """Rows of one query first, then chunks with or without a cached prefix, some of them empty; padding after."""
    s, rng = shape, np.random.default_rng(seed)
    q_len, kv_len, num_single = _lengths(s, rng)
    num_pages = 1 + s.rows * s.pages_per_row
    halves = 1 if s.spec.value_width else 2
    table = 1 + rng.permutation(num_pages - 1).reshape(s.rows, s.pages_per_row)
    values = rng.standard_normal((num_pages, halves, s.page_size, s.kv_heads, s.width), np.float32)
    owned = np.zeros((num_pages, s.page_size), bool)
    for row, length in enumerate(kv_len):
        position = np.arange(length)
        owned[table[row, position // s.page_size], position % s.page_size] = True
    values[~owned.reshape(num_pages, 1, s.page_size).repeat(halves, 1)] = 300.0
    q = rng.standard_normal((s.tokens, s.kv_heads, s.group, s.width), np.float32)
    sinks = jnp.asarray(rng.standard_normal((s.kv_heads, s.group), np.float32)) if s.sinks else None
    starts = np.cumsum(q_len) - q_len
    rows = [jnp.asarray(x, jnp.int32) for x in (starts, q_len, kv_len, num_single, table)]
    return Case(jnp.asarray(q), _stored(values, s.dtype), RaggedRows(*rows), sinks)


def _stored(values: np.ndarray, dtype: Any) -> Any:
    if not is_quantized(dtype):
        return jnp.asarray(values, dtype)
    small, scales = quantize(jnp.asarray(values), dtype)
    return QuantizedPages(small, scales.astype(SCALE_DTYPE))


def _lengths(s: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    num_rows = int(rng.integers(0, s.rows + 1))
    num_single = int(rng.integers(0, min(num_rows, s.tokens) + 1))
    q_len, room = np.zeros(s.rows, int), s.tokens - num_single
    q_len[:num_single] = 1
    for row in range(num_single, num_rows):
        most = min(room, s.longest)
        q_len[row] = (0, min(1, most), most, int(rng.integers(0, most + 1)))[rng.integers(4)]
        room -= q_len[row]
    some = (1, s.page_size, 64, 65, s.longest)
    kv_len = [min(max(q, (*some, int(rng.integers(1, s.longest + 1)))[rng.integers(6)]), s.longest) for q in q_len]
    return q_len, np.where(np.arange(s.rows) < num_rows, np.maximum(kv_len, q_len), 0), num_single
