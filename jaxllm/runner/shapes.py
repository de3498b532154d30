"""Every static size of an engine's programs, and the few sizes of batch they are compiled for.

Plain numbers in, buckets and layouts out. Knows nothing of devices, programs or requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.config import CacheRow
from jaxllm.kv.layout import PageLayout
from jaxllm.ops.attention import XLA, AttentionBackend
from jaxllm.runner.batch import make_buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerShapes:
    """Every static size of the compiled programs; requests, tokens and pages are those of one replica."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    max_decode_steps: int
    kv_dtype: jnp.dtype
    residual_dtype: jnp.dtype
    deterministic: bool = False
    attention: AttentionBackend = XLA
    num_replicas: int = 1
    token_multiple: int = 1
    single_row: bool = False  # whether a program for one row pays: XLA's products cost for 1 row what they do for 4

    def page_layout(self, row: CacheRow, kv_copies: int) -> PageLayout:
        """Of one layer's cache, the pages of all replicas."""
        return PageLayout(
            row=row, num_pages=self.num_pages * self.num_replicas, page_size=self.page_size, kv_copies=kv_copies,
            dtype=self.kv_dtype, interleaved=self.attention.interleaved_pages,
        )  # fmt: skip

    @property
    def spare_slot(self) -> int:
        """The slot after all requests' slots: padding rows use it."""
        return self.num_replicas * self.max_num_seqs

    @property
    def pages_per_row(self) -> int:
        """Width of the page table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Sizes of the ragged step, rounded up to what the token cuts of the mesh divide."""
        largest = self.max_num_batched_tokens
        buckets = (largest,) if self.deterministic else make_buckets(min(64, largest), largest, 4)
        return tuple(dict.fromkeys(-(-size // self.token_multiple) * self.token_multiple for size in buckets))

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """Sizes of the sampling step and the decode loop."""
        if self.deterministic:
            return (max(4, self.max_num_seqs),)
        buckets = make_buckets(4, max(4, self.max_num_seqs), 2)
        return (1, *buckets) if self.single_row else buckets

    @property
    def sampling_programs(self) -> tuple[str, ...]:
        """Programs that sample; without a decode loop every iteration is a ragged step."""
        return ("sample", "decode") if self.max_decode_steps else ("sample",)

    @property
    def scoring_buckets(self) -> tuple[int, ...]:
        """Sizes of scoring passes: two, since every size is one more program."""
        buckets = self.token_buckets
        return tuple(dict.fromkeys((buckets[len(buckets) // 2], buckets[-1])))
