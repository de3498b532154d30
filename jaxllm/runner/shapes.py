"""Every static size of an engine's programs, and the few sizes of batch they are compiled for.

An `EngineConfig`, a model and the memory of its devices -> `RunnerShapes`. What the configuration says in words
(`deterministic`, `auto`) is turned into plain numbers and facts here, once. Knows nothing of programs or requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.adapters.slots import slot_bytes
from jaxllm.config import CacheRow, EngineConfig, SpeculativeConfig
from jaxllm.kv.layout import PageLayout, token_bytes
from jaxllm.kv.memory import KVMemory
from jaxllm.ops.attention import XLA, AttentionBackend, choose_backend, fit_backend
from jaxllm.runner.connections import Alone, Connection
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.telemetry.device_peaks import engine_cost, known_ceilings
from jaxllm.telemetry.drafts import verifying_ratio
from jaxllm.weights.abstract import AbstractModel

_CPU_CACHE_BYTES = 384 << 20  # the default model's longest request; a server sets its own
_TEMPORARY_BYTES = 1 << 30  # left free on an accelerator for activations and logits
_WORTH_COMPILING = 1.25  # tokens per plain iteration's time, where all drafts are right
_DETERMINISTIC_TILE = 16  # queries of one tile of attention: every decode has a tile of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerShapes:
    """Every static size of the compiled programs; requests, tokens and pages are those of one replica.

    Attributes:
        token_buckets: sizes of the ragged step.
        row_buckets: sizes of the sampling step and the decode loop.
        max_decode_steps: iterations of one decode loop; 0: there is none, every iteration is a ragged step.
        max_loras, max_lora_rank: slots for adapters and their rank; no slots: adapters are off.
        kv_as_integers: whether the cache's small floats are kept as integers of their bits.
        separate_greedy: whether rows that are all plainly greedy have programs of their own.
        speculation: how tokens are drafted in decode loops, or None.
        speculating_rows: rows up to which that can pay.
        singles_first: whether rows of one query are attended to apart from longer ones, as in a decode loop.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    token_buckets: tuple[int, ...]
    row_buckets: tuple[int, ...]
    max_decode_steps: int
    kv_dtype: jnp.dtype
    residual_dtype: jnp.dtype
    attention: AttentionBackend = XLA
    kv_as_integers: bool = False
    num_replicas: int = 1
    speculation: SpeculativeConfig | None = None
    speculating_rows: int = 0
    max_loras: int = 0
    max_lora_rank: int = 16
    separate_greedy: bool = True
    singles_first: bool = True

    def page_layout(self, row: CacheRow, kv_copies: int) -> PageLayout:
        """Of one layer's cache, the pages of all replicas."""
        return PageLayout(
            row=row,
            num_pages=self.num_pages * self.num_replicas,
            page_size=self.page_size,
            kv_copies=kv_copies,
            dtype=self.kv_dtype,
            interleaved=self.attention.interleaved_pages,
            as_integers=self.kv_as_integers,
        )

    @property
    def spare_slot(self) -> int:
        """The slot after all requests' slots: padding rows use it."""
        return self.num_replicas * self.max_num_seqs

    @property
    def num_drafts(self) -> int:
        """Tokens drafted per row and iteration of a decode loop, at most."""
        return self.speculation.num_speculative_tokens if self.speculation and self.max_decode_steps else 0

    def speculates(self, bucket: int) -> bool:
        """Whether decode loops of so many rows can verify drafts."""
        return self.num_drafts > 0 and bucket <= self.speculating_rows

    @property
    def pages_per_row(self) -> int:
        """Width of the page table."""
        return -(-self.max_model_len // self.page_size)

    @property
    def mask_words(self) -> int:
        """Words of a bit mask over the vocabulary."""
        return -(-self.vocab_size // 32)

    @property
    def scoring_buckets(self) -> tuple[int, ...]:
        """Sizes of scoring passes: two, since every size is one more program."""
        buckets = self.token_buckets
        return tuple(dict.fromkeys((buckets[len(buckets) // 2], buckets[-1])))


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """Smallest bucket that holds `size`."""
    for bucket in buckets:
        if size <= bucket:
            return bucket
    raise AssertionError(f"{size} exceeds the largest bucket {buckets[-1]}")


def make_buckets(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """Geometric sizes from `smallest` to exactly `largest`."""
    sizes = [largest]
    while sizes[-1] > smallest:
        sizes.append(max(smallest, sizes[-1] // factor))
    return tuple(reversed(sizes))


def runner_shapes(config: EngineConfig, model: AbstractModel, connection: Connection | None = None) -> RunnerShapes:
    """Fix every static size, the same on all processes.

    Raises ValueError where the cache cannot hold one request of `max_model_len`.
    """
    platform = model.placement.mesh.devices.flat[0].platform
    weights = jnp.dtype("bfloat16" if config.dtype == "auto" else config.dtype)
    on_cpu = jnp.dtype(jnp.float32) if platform == "cpu" else weights
    wanted = choose_backend(config.attention_backend, platform)
    kv_dtype = _kv_dtype(config, weights, slow=platform == "cpu" and wanted.name != "llvm")
    cache_bytes = (connection or Alone()).least(_cache_bytes(config, model))
    models = [model, *([model.draft] if model.draft else [])]
    bytes_per_token = sum(token_bytes(each.cfg, kv_dtype, each.kv_copies) for each in models)
    attention = _attention(config, model, kv_dtype, wanted)
    num_pages, max_model_len = _lengths(config, model, cache_bytes, bytes_per_token)
    return RunnerShapes(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.token_budget,
        max_model_len=max_model_len,
        vocab_size=model.cfg.vocab_size,
        num_pages=num_pages,
        page_size=config.page_size,
        token_buckets=token_buckets(config, model.placement.token_multiple(), few_tokens=model.is_packed),
        row_buckets=_row_buckets(config, single_row=model.is_packed),
        max_decode_steps=0 if config.deterministic else config.max_decode_steps,
        kv_dtype=kv_dtype,
        residual_dtype=on_cpu,
        attention=attention,
        kv_as_integers=platform == "cpu" and attention.reads_integers,
        num_replicas=model.placement.parts("pages"),
        speculation=config.speculative,
        speculating_rows=_speculating_rows(config, model, kv_dtype),
        max_loras=config.max_loras if config.enable_lora else 0,
        max_lora_rank=config.max_lora_rank,
        separate_greedy=not config.deterministic,
        # Deterministic: a token must not know whether it came as a decode or in a chunk, so its row is attended alike.
        singles_first=not config.deterministic,
    )


def _kv_dtype(config: EngineConfig, weights: jnp.dtype, *, slow: bool) -> jnp.dtype:
    """That of the weights; float32 where a CPU has no kernel that reads smaller numbers (`slow`)."""
    if config.kv_dtype == "auto":
        return jnp.dtype(jnp.float32) if slow else weights
    return jnp.dtype("float8_e4m3fn" if config.kv_dtype == "fp8" else config.kv_dtype)


def _cache_bytes(config: EngineConfig, model: AbstractModel) -> int:
    """Bytes for the pages of one replica, over all devices that share them."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    devices = model.placement.mesh.local_devices  # another process's cannot be asked
    known = [stats for device in devices if device.platform != "cpu" and (stats := device.memory_stats())]
    if not known:
        return _CPU_CACHE_BYTES // model.placement.parts("pages")
    taken = model.parameter_bytes_per_device() + _TEMPORARY_BYTES
    taken += slot_bytes(model.targets, model.placement, config.max_loras, config.max_lora_rank)
    left = (int(stats["bytes_limit"] * config.gpu_memory_utilization) - stats["bytes_in_use"] for stats in known)
    return max(min(left) - taken, 0) * (model.placement.parts("heads") if model.cfg.cache_row.is_cut else 1)


def _lengths(config: EngineConfig, model: AbstractModel, cache_bytes: int, bytes_per_token: int) -> tuple[int, int]:
    """Pages of one replica, and tokens of the longest request."""
    num_pages = cache_bytes // (bytes_per_token * config.page_size)
    capacity = (num_pages - 1) * config.page_size
    max_model_len = config.max_model_len or min(model.cfg.max_position_embeddings, max(capacity, 0))
    if max_model_len > (limit := model.cfg.position_limit):
        raise ValueError(f"max_model_len={max_model_len} exceeds the {limit} positions of the model; lower it")
    if capacity < max_model_len or capacity < 1:
        needed = bytes_per_token * (max_model_len + 2 * config.page_size)
        raise ValueError(
            f"the KV cache holds {max(capacity, 0)} tokens, fewer than max_model_len={max_model_len}; raise "
            f"kv_cache_memory_bytes to {needed} or lower max_model_len"
        )
    return num_pages, max_model_len


def token_buckets(config: EngineConfig, multiple: int = 1, *, few_tokens: bool = False) -> tuple[int, ...]:
    """Of the ragged step, rounded up to what the token cuts of the mesh divide; deterministic: one size for all.

    With `few_tokens` one more, where 16 cost less than 64: what is new of a prompt whose rest is cached is often short.
    """
    largest = config.token_budget
    few = (16,) * (few_tokens and largest > 16)
    sizes = (largest,) if config.deterministic else (*few, *make_buckets(min(64, largest), largest, 4))
    return tuple(dict.fromkeys(-(-size // multiple) * multiple for size in sizes))


def _row_buckets(config: EngineConfig, *, single_row: bool) -> tuple[int, ...]:
    """A size of one row only where it pays: XLA's products cost for 1 row what they do for 4."""
    largest = max(4, config.max_num_seqs)
    if config.deterministic:
        return (largest,)
    return (1,) * single_row + make_buckets(4, largest, 2)


def _speculating_rows(config: EngineConfig, model: AbstractModel, kv_dtype: jnp.dtype) -> int:
    """The most rows with which an iteration whose drafts are all right is worth what it costs."""
    if config.speculative is None:
        return 0
    num_drafts, chip = config.speculative.num_speculative_tokens, known_ceilings(model)
    ridge = chip.ridge if chip else None
    cost, replicas = engine_cost(model, kv_dtype), model.placement.parts("pages")
    buckets = _row_buckets(config, single_row=model.is_packed)
    ratios = ((rows, verifying_ratio(cost, rows * replicas, num_drafts, ridge)) for rows in buckets)
    return max((rows for rows, ratio in ratios if 1 + num_drafts >= _WORTH_COMPILING * ratio), default=0)


def _attention(
    config: EngineConfig, model: AbstractModel, kv_dtype: jnp.dtype, wanted: AttentionBackend
) -> AttentionBackend:
    local_heads = model.cfg.num_kv_heads * model.kv_copies // model.placement.parts("heads")
    backend = fit_backend(wanted, model.cfg, kv_dtype, local_heads)
    if model.placement.ring_size() > 1:
        backend = XLA  # the ring reads pages as XLA's attention does
    return dataclasses.replace(backend, query_tile=_DETERMINISTIC_TILE) if config.deterministic else backend


def _window(model: AbstractModel) -> int | None:
    """Keys that a query of the model or its draft sees; None: all."""
    windows = [model.cfg.cache_window, *([model.draft.cfg.cache_window] if model.draft else [])]
    known = [window for window in windows if window is not None]
    return max(known) if len(known) == len(windows) else None


def make_memory(
    model: AbstractModel, shapes: RunnerShapes, *, enable_prefix_caching: bool = True, namespace: str = ""
) -> KVMemory:
    """The KV cache that these shapes leave room for, not yet allocated; see `PagePool` for the last two."""
    layout = shapes.page_layout(model.cfg.cache_row, model.kv_copies)
    pools = [
        PagePool(
            shapes.num_pages,
            shapes.page_size,
            enable_prefix_caching=enable_prefix_caching,
            namespace=namespace,
            window=_window(model),
        )
        for _ in range(shapes.num_replicas)
    ]
    memory = KVMemory(layout, model.cfg.num_layers, model.placement, pools)
    if (draft := model.draft) is not None:
        memory.draft_layout = shapes.page_layout(draft.cfg.cache_row, draft.kv_copies)
        memory.num_draft_layers = draft.cfg.num_layers
    return memory
