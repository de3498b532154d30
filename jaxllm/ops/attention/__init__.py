"""Ragged paged attention behind one function; `xla` runs everywhere and is the oracle of every kernel."""

from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows
from jaxllm.ops.attention.xla import ragged_paged_attention

__all__ = ["AttentionSpec", "RaggedRows", "ragged_paged_attention"]
