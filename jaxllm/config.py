"""What a model is and how an engine runs it: two frozen dataclasses, plain Python.

A Hugging Face `config.json` -> `ModelConfig` (through the family that knows its keys); flags or keyword
arguments -> `EngineConfig`. Knows nothing of arrays, devices or files.
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
class RopeScaling:
    """Llama 3.1 rotary scaling: stretch low frequencies by `factor`, blend in between (Hugging Face "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every rotary frequency divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Frequencies that turn fewer than `beta_slow` times in the original context are stretched, those above
    `beta_fast` kept; cosines and sines are multiplied by `attention_factor` (YaRN, Peng et al. 2023)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    attention_factor: float
    truncate: bool  # round the two borders to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one layer: how many dims of a head turn, and how fast."""

    dim: int
    theta: float
    scaling: RopeScaling | LinearScaling | YarnScaling | None
    interleaved: bool = False  # pairs are (2i, 2i + 1) instead of (i, i + dim/2)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAttention:
    """Layers whose queries see only the last `window` keys, their own included."""

    window: int
    layers: tuple[int, ...]
    rope_theta: float | None = None  # a base of their own, then unscaled (Gemma 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads come from one compressed row."""

    q_rank: int | None  # None: queries are not compressed
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool

    @property
    def cache_width(self) -> int:
        """Elements that one token leaves in the cache of one layer."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExperts:
    """A mixture of experts in place of the dense FFN: the router's choice and the experts' sizes.

    `score`: "softmax" over all experts, "softmax_chosen" over the chosen ones, or "sigmoid" each.
    """

    num_experts: int
    per_token: int
    ffn_size: int
    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    num_groups: int = 1  # experts are chosen from the best `groups_per_token` groups only
    groups_per_token: int = 1
    group_score: str = "max"  # or "top2": the sum of a group's two best
    correction_bias: bool = False  # added to the scores that choose, not to those that weigh
    bias: bool = False  # on the router and on every expert's matrices
    shared_size: int = 0  # FFN width of the expert that every token visits
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= self.num_experts:
            raise ValueError(f"{self.per_token} experts per token of {self.num_experts}; it must be between 1 and all")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"{self.num_experts} experts do not divide into {self.num_groups} groups")
        if not 1 <= self.groups_per_token <= self.num_groups:
            raise ValueError(f"{self.groups_per_token} groups per token of {self.num_groups}; expected 1 to all")
        if self.score not in ("softmax", "softmax_chosen", "sigmoid") or self.group_score not in ("max", "top2"):
            raise ValueError(f"expert scores {self.score!r} and group scores {self.group_score!r} are not supported")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiglu:
    """`(up + 1) * gate * sigmoid(alpha * gate)` with both clamped at `limit` (gpt-oss)."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The mathematics of one decoder. Every field changes its output; there is no field that nothing reads.

    Attributes:
        norm: "rms" or "layer" (with mean and bias).
        pre_norm, post_norm: a norm before each half of a block, after it, or both.
        qk_norm: None, "head" (each head by itself) or "full" (over all heads together).
        activation: "silu" or "gelu_tanh"; `gated` says whether it gates a second product.
        embedding_scale: multiplies the embeddings. attention_scale: of the scores; None is `head_dim**-0.5`.
        attention_softcap, final_softcap: `cap * tanh(x / cap)` on scores and logits.
        attention_sinks: a learned logit per head that takes weight and gives nothing.
        rotary_dim: dims of a head that rotate; 0 = none (`learned_positions` instead), None = all.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | LinearScaling | YarnScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    rotary_dim: int | None = None
    learned_positions: bool = False
    embedding_scale: float = 1.0
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    clamped_swiglu: ClampedSwiglu | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    final_softcap: float | None = None
    local: LocalAttention | None = None
    latent: LatentAttention | None = None
    experts: RoutedExperts | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} in the model's configuration; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide by num_kv_heads={self.num_kv_heads}; "
                "each key/value head must serve a whole number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even head width")
        words = {
            "norm": ("rms", "layer"),
            "qk_norm": (None, "head", "full"),
            "activation": ("silu", "gelu_tanh"),
        }
        for name, known in words.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} in the model's configuration; expected one of {known}")
        if not (self.pre_norm or self.post_norm):
            raise ValueError("pre_norm and post_norm are both off; a block needs one of them")
        if self.local and self.local.window < 1:
            raise ValueError(f"window={self.local.window} in the model's configuration; it must be at least 1")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`. Raises ValueError for what this engine would compute wrongly."""
        from jaxllm.models.families import family_of

        return family_of(hf).config(hf)

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees at most."""
        return self.local.window if self.local and layer in self.local.layers else None

    @property
    def cache_window(self) -> int | None:
        """Keys beyond which no layer looks back; None where some layer sees all."""
        is_local = self.local is not None and set(range(self.num_layers)) <= set(self.local.layers)
        return self.local.window if self.local and is_local else None

    def rope(self, layer: int) -> Rope | None:
        """This layer's rotary embedding."""
        dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        interleaved = False
        if self.latent:
            dim, interleaved = self.latent.rope_dim, self.latent.interleaved
        if not dim:
            return None
        if self.window(layer) and self.local and self.local.rope_theta is not None:
            return Rope(dim=dim, theta=self.local.rope_theta, scaling=None, interleaved=interleaved)
        return Rope(dim=dim, theta=self.rope_theta, scaling=self.rope_scaling, interleaved=interleaved)

    def is_routed(self, layer: int) -> bool:
        """Whether this layer's FFN is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def score_scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, tied ones counted once."""
        return self._tables() + sum(self._block(i, active=False) for i in range(self.num_layers))

    @property
    def num_active_parameters(self) -> int:
        """Elements of the weights that one token meets: of the routed experts only those it is sent to."""
        return self._tables() + sum(self._block(i, active=True) for i in range(self.num_layers))

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token occupies over all layers (K_tok of the roofline)."""
        width = self.latent.cache_width if self.latent else 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * width * itemsize

    def _tables(self) -> int:
        d = self.hidden_size
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return tables + self._norm() + (self.max_position_embeddings * d if self.learned_positions else 0)

    def _norm(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    def _block(self, layer: int, *, active: bool) -> int:
        d, norms = self.hidden_size, 2 * (self.pre_norm + self.post_norm) * self._norm()
        attention = self._latent_attention(self.latent) if self.latent else self._attention()
        if self.experts is None or not self.is_routed(layer):
            return norms + attention + self._ffn(self.intermediate_size, bias=self.mlp_bias)
        e = self.experts
        router = e.num_experts * (d + e.correction_bias + e.bias)
        shared = self._ffn(e.shared_size, bias=self.mlp_bias) if e.shared_size else 0
        count = e.per_token if active else e.num_experts
        return norms + attention + router + shared + count * self._ffn(e.ffn_size, bias=e.bias)

    def _ffn(self, size: int, *, bias: bool) -> int:
        ups = 2 if self.gated else 1
        return (ups + 1) * self.hidden_size * size + (ups * size + self.hidden_size if bias else 0)

    def _attention(self) -> int:
        d, n, k, h = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        norms = {None: 0, "head": 2 * h, "full": (n + k) * h}[self.qk_norm]
        biases = (n + 2 * k) * h * self.qkv_bias + d * self.out_bias + n * self.attention_sinks
        return d * h * (n + 2 * k) + n * h * d + norms + biases

    def _latent_attention(self, a: LatentAttention) -> int:
        d, n, q_width = self.hidden_size, self.num_heads, a.nope_dim + a.rope_dim
        queries = d * n * q_width if a.q_rank is None else a.q_rank * (d + 1 + n * q_width)
        keys = d * a.cache_width + a.kv_rank + a.kv_rank * n * (a.nope_dim + a.value_dim)
        return queries + keys + n * a.value_dim * d


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
