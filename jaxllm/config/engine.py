"""How an engine runs.

Flags or keyword arguments -> `EngineConfig`, checked. Knows nothing of models, arrays, devices or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxllm.config.fields import check_types
from jaxllm.config.kv_events import KVEventsConfig
from jaxllm.config.kv_transfer import KVTransferConfig
from jaxllm.config.speculative import SpeculativeConfig

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
KVDtype = Literal["auto", "bfloat16", "float16", "float32", "int8", "fp8"]
MatmulBackend = Literal["auto", "xla", "llvm"]
AttentionBackend = Literal["auto", "xla", "llvm", "pallas_gpu", "pallas_tpu"]
LoadFormat = Literal["auto", "dummy"]
ActivationDtype = Literal["auto", "int8"]
Quantization = Literal["auto", "none", "int8", "int4", "fp8", "compressed-tensors", "awq", "gptq", "mxfp4", "gguf"]
PreemptionMode = Literal["auto", "recompute", "swap"]
DTYPES: tuple[str, ...] = get_args(Dtype)
_PREFILL_SIZES = (
    "prefill_max_num_seqs",
    "prefill_max_num_batched_tokens",
    "prefill_page_size",
    "prefill_kv_cache_memory_bytes",
)
ATTENTION_BACKENDS: tuple[str, ...] = get_args(AttentionBackend)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs. Names as vLLM spells them; every field is also a flag of the command line.

    Attributes:
        model: short name, folder, .gguf file or Hugging Face id.
        tokenizer (NAME): take the tokenizer from this model instead.
        skip_tokenizer_init: load no tokenizer; prompts are token ids, and outputs too.
        chat_template (FILE): Jinja file, or the name of one of the model's own templates; default: the model's own.
        default_chat_template_kwargs (JSON): template variables for every conversation, for example
            '{"enable_thinking": false}'; a request may override them.
        sanitize_control_tokens: control tokens that somebody writes into a message, such as <|im_end|>, stay text.
        load_format: dummy makes random weights.
        dtype: of the weights.
        quantization: of the weights; auto keeps them as the checkpoint has them where that is faster, none expands
            them, int8, int4 and fp8 round them to nearest while they are loaded, and the name of a checkpoint's own
            method keeps them as they are.
        activation_dtype: of what quantised matrices multiply; auto leaves 16 bits unless the checkpoint asks for less,
            int8 rounds them in the groups of the matrix, as llama.cpp does: faster on a CPU, and less exact.
        kv_dtype: of the KV cache.
        max_model_len (TOKENS): prompt and output of one request; default: what the model and the cache allow.
        max_num_seqs (N): requests that run together.
        max_num_batched_tokens (TOKENS): of one iteration; default 512, deterministic 64.
        page_size (TOKENS): per page of the KV cache.
        kv_cache_memory_bytes (BYTES): memory for the KV cache of one replica; default: what the devices have left.
        gpu_memory_utilization (SHARE): of a device's memory that the engine may take, above 0 and at most 1.
        seed: from which requests without a seed of their own get one, and random weights.
        mesh (AXES): devices, for example 'tp=3' or 'dp=2,tp=4'.
        device_offset (N): leave the first N devices to others.
        prefill_mesh (AXES): two engines, each on devices of its own: prompts are computed on these, and go on in the
            decode pool (docs/disaggregation.md). All other fields are the decode pool's.
        decode_mesh (AXES): of the decode pool, beside prefill_mesh; instead of mesh.
        sharding_rules: shipped name or a .toml file.
        prefill_sharding_rules: of the prefill pool; default: sharding_rules.
        prefill_max_num_seqs (N): of the prefill pool; default: max_num_seqs.
        prefill_max_num_batched_tokens (TOKENS): of the prefill pool; default: max_num_batched_tokens.
        prefill_page_size (TOKENS): of the prefill pool; default: page_size.
        prefill_kv_cache_memory_bytes (BYTES): of the prefill pool; default: kv_cache_memory_bytes.
        max_decode_steps (N): decode iterations per dispatch, where nobody waits for each token.
        deterministic: the same tokens alone and in any batch, bit by bit: every iteration runs in one shape, whatever
            takes part; slower.
        speculative_config (JSON): guess tokens ahead and check several in one iteration (docs/speculative.md), for
            example '{"method": "ngram", "num_speculative_tokens": 4}'.
        enable_prefix_caching: reuse the pages of prompts that begin alike.
        enable_lora: serve adapters (LoRA) beside the model; requests of different ones run together.
        max_loras (N): adapters that can run at the same time.
        max_lora_rank (N): the largest rank of an adapter.
        max_cpu_loras (N): adapters kept ready in host memory; others are read again when they are asked for; default:
            max_loras.
        attention_backend: auto chooses by the platform.
        matmul_backend: auto chooses by the processor.
        host_kv_bytes (BYTES): host memory for evicted KV pages.
        disk_kv_bytes (BYTES): disk space for KV pages.
        disk_kv_path (FOLDER): where they are kept, also for the next process.
        preemption_mode: what becomes of the cache of a request that is pushed out; swap needs host_kv_bytes.
        kv_transfer_config (JSON): hand requests over between servers, for example '{"kv_role": "kv_producer"}'
            (docs/disaggregation.md).
        kv_events_config (JSON): tell routers what the prefix cache holds, for example
            '{"endpoint": "tcp://127.0.0.1:5557"}' (docs/disaggregation.md).
        coordinator_address (HOST:PORT): of process 0, where there are several (docs/pods.md).
        num_processes (N): how many processes there are.
        process_id (I): which of them this is, from 0.
        distributed: take these three from Slurm, GKE or the TPU slice.
    """

    model: str = "smollm2-135m-instruct"
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    default_chat_template_kwargs: Mapping[str, Any] | None = None
    sanitize_control_tokens: bool = True
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization = "auto"
    activation_dtype: ActivationDtype = "auto"
    kv_dtype: KVDtype = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    seed: int = 0
    mesh: str = "tp=1"
    device_offset: int = 0
    prefill_mesh: str | None = None
    decode_mesh: str | None = None
    sharding_rules: str = "megatron"
    prefill_sharding_rules: str | None = None
    prefill_max_num_seqs: int | None = None
    prefill_max_num_batched_tokens: int | None = None
    prefill_page_size: int | None = None
    prefill_kv_cache_memory_bytes: int | None = None
    max_decode_steps: int = 8
    deterministic: bool = False
    speculative_config: Mapping[str, Any] | None = None
    enable_prefix_caching: bool = True
    enable_lora: bool = False
    max_loras: int = 1
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    attention_backend: AttentionBackend = "auto"
    matmul_backend: MatmulBackend = "auto"
    host_kv_bytes: int = 0
    disk_kv_bytes: int = 0
    disk_kv_path: str | None = None
    preemption_mode: PreemptionMode = "auto"
    kv_transfer_config: Mapping[str, Any] | None = None
    kv_events_config: Mapping[str, Any] | None = None
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        at_least_one = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "max_decode_steps")
        at_least_one += ("max_loras", "max_lora_rank", "max_cpu_loras", *_PREFILL_SIZES)
        for name in (*at_least_one, "kv_cache_memory_bytes", "num_processes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}; "
                "every running request needs one token per iteration, so raise the first or lower the second"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras={self.max_cpu_loras} is below max_loras={self.max_loras}; raise it")
        self._check_tiers()
        self._check_processes()
        self._check_pools()
        if self.speculative is not None and self.deterministic:
            raise ValueError("deterministic runs every iteration in one shape, speculative_config in two; choose one")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}; it must be in (0, 1]")

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """`speculative_config`, checked."""
        given = self.speculative_config
        return None if given is None else SpeculativeConfig.from_mapping(given)

    @property
    def token_budget(self) -> int:
        """Tokens of one iteration."""
        return self.max_num_batched_tokens or max(64 if self.deterministic else 512, self.max_num_seqs)

    def _check_pools(self) -> None:
        if self.kv_events_config is not None:
            KVEventsConfig.from_json(self.kv_events_config)
        if self.kv_transfer_config is not None:
            KVTransferConfig.from_json(self.kv_transfer_config)
            if self.prefill_mesh is not None:
                raise ValueError("kv_transfer_config is for one pool a process; leave prefill_mesh and decode_mesh out")
            if self.distributed or self.coordinator_address is not None:
                raise ValueError("kv_transfer_config is for engines of one process each; leave the processes out")
        is_handed_over = self.kv_transfer_config is not None or self.prefill_mesh is not None
        if is_handed_over and self.speculative is not None and self.speculative.method == "draft_model":
            raise ValueError(
                "speculative_config: a draft model's own pages are not handed over; use method 'ngram' with "
                "prefill_mesh, decode_mesh or kv_transfer_config"
            )
        if (self.prefill_mesh is None) != (self.decode_mesh is None):
            raise ValueError("prefill_mesh and decode_mesh belong together; set both, or mesh alone")
        if self.prefill_mesh is None:
            for name in ("prefill_sharding_rules", *_PREFILL_SIZES):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for two pools; set prefill_mesh and decode_mesh as well")
            return
        if self.mesh != "tp=1":
            raise ValueError("mesh is for one pool; with prefill_mesh and decode_mesh leave it out")
        if self.distributed or self.coordinator_address is not None:
            raise ValueError(
                "prefill_mesh and decode_mesh are for one process; across processes start one server for each pool, "
                "with kv_transfer_config"
            )

    def _check_processes(self) -> None:
        if self.device_offset < 0:
            raise ValueError(f"device_offset={self.device_offset!r}; it must be a whole number of at least 0")
        number, count = self.process_id, self.num_processes
        for name, value, least in (("num_processes", count, 1), ("process_id", number, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least {least}")
        if number is not None and count is not None and not 0 <= number < count:
            raise ValueError(f"process_id={number} of num_processes={count}; count from 0")

    def _check_tiers(self) -> None:
        for name in ("host_kv_bytes", "disk_kv_bytes"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value!r}; it must be a whole number, 0 for none")
        if self.disk_kv_bytes and not self.host_kv_bytes:
            raise ValueError("disk_kv_bytes needs host_kv_bytes: pages reach the disk through host memory; set both")
        if bool(self.disk_kv_bytes) != (self.disk_kv_path is not None):
            raise ValueError("disk_kv_bytes and disk_kv_path belong together; set both or neither")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EngineConfig:
        """Build from user keywords; an unknown one is refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"unknown engine argument {unknown[0]!r}; known ones are {', '.join(sorted(known))}")
        return cls(**kwargs)
