"""How an engine runs.

Flags or keyword arguments -> `EngineConfig`, checked. Knows nothing of models, arrays, devices or files.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")
KV_DTYPES = (*DTYPES, "int8", "fp8")
MATMUL_BACKENDS = ("auto", "xla", "llvm")
ATTENTION_BACKENDS = ("auto", "xla", "llvm", "pallas_gpu", "pallas_tpu")
LOAD_FORMATS = ("auto", "dummy")
PREEMPTION_MODES = ("auto", "recompute", "swap")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs. Names as vLLM spells them; sizes in tokens, requests or bytes.

    With `deterministic` every iteration runs in one shape, whatever takes part: a request's greedy and seeded tokens
    are bitwise the same alone and in any mix. That shape has `token_budget` tokens, for a decode as for a prefill.
    """

    model: str = "smollm2-135m-instruct"
    tokenizer: str | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    mesh: str = "tp=1"
    device_offset: int = 0
    sharding_rules: str = "megatron"
    skip_tokenizer_init: bool = False
    max_decode_steps: int = 8
    deterministic: bool = False
    load_format: str = "auto"
    attention_backend: str = "auto"
    matmul_backend: str = "auto"
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    disk_kv_path: str | None = None
    preemption_mode: str = "auto"
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        words = {"dtype": DTYPES, "kv_dtype": KV_DTYPES, "load_format": LOAD_FORMATS,
                 "attention_backend": ATTENTION_BACKENDS, "matmul_backend": MATMUL_BACKENDS}  # fmt: skip
        for name, known in words.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(known)}")
        at_least_one = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "max_decode_steps")
        for name in (*at_least_one, "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}; "
                "every running request needs one token per iteration, so raise the first or lower the second"
            )
        self._check_tiers()
        self._check_processes()
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}; it must be in (0, 1]")

    @property
    def token_budget(self) -> int:
        """Tokens of one iteration."""
        return self.max_num_batched_tokens or max(64 if self.deterministic else 512, self.max_num_seqs)

    @property
    def is_distributed(self) -> bool:
        """Whether this is one of several processes; launchers say so in the environment."""
        return self.distributed or bool(self.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"))

    def _check_processes(self) -> None:
        if not isinstance(self.device_offset, int) or self.device_offset < 0:
            raise ValueError(f"device_offset={self.device_offset!r}; it must be a whole number of at least 0")
        number, count = self.process_id, self.num_processes
        if number is not None and count is not None and not 0 <= number < count:
            raise ValueError(f"process_id={number} of num_processes={count}; count from 0")
        if self.is_distributed and self.host_kv_bytes:
            raise ValueError("host_kv_bytes is for one process; leave it out where there are several")

    def _check_tiers(self) -> None:
        for name in ("host_kv_bytes", "disk_kv_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}; it must be a whole number, 0 for none")
        if self.disk_kv_bytes and not self.host_kv_bytes:
            raise ValueError("disk_kv_bytes needs host_kv_bytes: pages reach the disk through host memory; set both")
        if bool(self.disk_kv_bytes) != (self.disk_kv_path is not None):
            raise ValueError("disk_kv_bytes and disk_kv_path belong together; set both or neither")
        if self.preemption_mode not in PREEMPTION_MODES:
            modes = ", ".join(PREEMPTION_MODES)
            raise ValueError(f"preemption_mode={self.preemption_mode!r} is not known; use one of {modes}")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EngineConfig:
        """Build from user keywords; an unknown one is refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"unknown engine argument {unknown[0]!r}; known ones are {', '.join(sorted(known))}")
        return cls(**kwargs)
