"""One `attention` for every platform: picks the implementation, and says once where it cannot have the one asked for.

`xla` runs everywhere and is the oracle; `llvm` (for CPUs), `pallas_gpu` and `pallas_tpu` are kernels. A kernel that
cannot take a layer falls back to `xla`, once loudly in the log. Knows platforms by their name only.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import jax

from jaxllm.config import ATTENTION_BACKENDS, ModelConfig
from jaxllm.ops.attention import xla
from jaxllm.ops.attention.metadata import AttentionSpec, RaggedRows, SingleRows
from jaxllm.ops.cpu import ffi

log = logging.getLogger(__name__)
_PLATFORM_OF = {"llvm": ("cpu",), "pallas_gpu": ("gpu", "cuda"), "pallas_tpu": ("tpu",)}


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """A chosen implementation.

    Attributes:
        name: "xla", "llvm", "pallas_gpu" or "pallas_tpu".
        interpret: run a kernel's operations through XLA: for tests of its arithmetic on a CPU.
        query_tile: queries of a row that `xla` takes together.
    """

    name: str = "xla"
    interpret: bool = False
    query_tile: int = 64

    @property
    def reads_integers(self) -> bool:
        """Whether it reads caches whose small floats are kept as integers (`kv.at_rest`)."""
        return self.name in ("xla", "llvm")

    @property
    def interleaved_pages(self) -> bool:
        """Whether its pages are `[P, C, 2K, H]`."""
        return self.name == "pallas_tpu"


XLA = AttentionBackend()


def fit_backend(backend: AttentionBackend, cfg: ModelConfig, dtype: Any, num_kv_heads: int) -> AttentionBackend:
    """Give up the TPU kernel, which fixes the layout of the pages, for a model that it cannot serve.

    Args:
        dtype: of the cache.
        num_kv_heads: that one device holds.
    """
    if backend.name == "pallas_tpu":
        from jaxllm.ops.attention import pallas_tpu

        if reason := pallas_tpu.unsupported(cfg, dtype, num_kv_heads):
            _say_once(backend.name, reason)
            return XLA
    return backend


def choose_backend(requested: str, platform: str) -> AttentionBackend:
    """`"auto"` or a name, and a device's platform -> what will run. Raises ValueError for what cannot run there."""
    if requested not in ATTENTION_BACKENDS:
        raise ValueError(f"attention_backend={requested!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    if requested == "auto":
        fitting = [name for name, platforms in _PLATFORM_OF.items() if platform in platforms]
        return AttentionBackend(fitting[0]) if fitting and not _missing(fitting[0]) else XLA
    if requested != "xla" and platform in _PLATFORM_OF[requested] and (reason := _missing(requested)):
        raise ValueError(f"attention_backend={requested!r} cannot run: {reason}; use auto or xla")
    if requested == "xla" or platform in _PLATFORM_OF[requested]:
        return AttentionBackend(requested)
    if requested == "pallas_gpu" and platform == "cpu":
        log.warning("attention_backend=pallas_gpu is interpreted on a CPU: correct and very slow, for tests only")
        return AttentionBackend(requested, interpret=True)
    raise ValueError(f"attention_backend={requested!r} does not run on {platform}; use auto or xla")


def _missing(name: str) -> str | None:
    """What a kernel needs and this machine lacks."""
    return ffi.unavailable() if name == "llvm" else None


def attention(
    q: jax.Array,
    pages: Any,
    rows: RaggedRows | SingleRows,
    *,
    spec: AttentionSpec,
    sinks_KG: jax.Array | None = None,
    backend: AttentionBackend = XLA,
) -> jax.Array:
    """Causal attention of every query over its own request's pages.

    Args:
        q: `[T, K, G, H]`; with `SingleRows` one query per row, `[R, K, G, H]`.
        pages: one layer's cache, with this iteration's keys and values already written.
        rows: who owns which queries and pages.
        spec: scale, window, soft-cap and where the values are.
        sinks_KG: a logit per query head that takes part in the softmax and gives no value.
        backend: what to run it with.

    Returns:
        Like `q`; the last dim is the values' width. Queries of nobody give zeros.
    """
    if backend.name == "llvm":
        from jaxllm.ops.cpu import attention as cpu

        if (reason := cpu.unsupported(pages, spec)) is None:
            return cpu.attention(q, pages, rows, spec=spec, sinks_KG=sinks_KG)
        _say_once(backend.name, reason)
    if backend.name == "pallas_gpu":
        from jaxllm.ops.attention import pallas_gpu as kernel

        if (reason := kernel.unsupported(pages, spec)) is None:
            return kernel.attention(q, pages, rows, spec=spec, sinks_KG=sinks_KG, interpret=backend.interpret)
        _say_once(backend.name, reason)
    if backend.name == "pallas_tpu":
        from jaxllm.ops.attention import pallas_tpu

        return pallas_tpu.attention(q, pages, rows, spec=spec)
    if isinstance(rows, SingleRows):
        return xla.single_query_attention(q, pages, rows.kv_len, rows.page_table, spec=spec, sinks_KG=sinks_KG)
    return xla.ragged_paged_attention(q, pages, rows, spec=spec, sinks_KG=sinks_KG, query_tile=backend.query_tile)


@functools.cache
def _say_once(name: str, reason: str) -> None:
    log.warning("attention falls back from %s to xla, which is much slower: %s", name, reason)
