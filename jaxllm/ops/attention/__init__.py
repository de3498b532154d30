"""Ragged paged attention behind one function; `xla` runs everywhere and is the oracle of every kernel."""

from jaxllm.ops.attention.kv import QuantizedPages, split_pages
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows
from jaxllm.ops.attention.select import XLA, AttentionBackend, attention, choose_backend, fit_backend
from jaxllm.ops.attention.xla import ragged_paged_attention

__all__ = [
    "XLA",
    "AttentionBackend",
    "AttentionSpec",
    "QuantizedPages",
    "RaggedRows",
    "SingleRows",
    "attention",
    "choose_backend",
    "fit_backend",
    "ragged_paged_attention",
    "split_pages",
]
