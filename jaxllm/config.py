"""What a model is and how an engine runs it: two frozen dataclasses, plain Python.

A Hugging Face `config.json` -> `ModelConfig` (through the family that knows its keys); flags or keyword
arguments -> `EngineConfig`. Knows nothing of arrays, devices or files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1 rotary scaling: stretch low frequencies by `factor`, blend in between (Hugging Face "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The mathematics of one decoder. Every field changes its output; there is no field that nothing reads."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool

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

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`. Raises ValueError for what this engine would compute wrongly."""
        from jaxllm.models.families import family_of

        return family_of(hf).config(hf)

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, tied ones counted once."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = d * h * (self.num_heads + 2 * self.num_kv_heads) + self.num_heads * h * d
        block = attention + 3 * d * f + 2 * d
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * block + tables + d

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token occupies over all layers (K_tok of the roofline)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How one engine runs. Names as vLLM spells them; sizes in tokens, requests or bytes."""

    model: str = "smollm2-135m-instruct"
    tokenizer: str | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    page_size: int = 16
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    enable_prefix_caching: bool = True
    mesh: str = "tp=1"
    sharding_rules: str = "megatron"
    skip_tokenizer_init: bool = False
    max_decode_steps: int = 8

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_dtype"):
            if (value := getattr(self, name)) not in DTYPES:
                raise ValueError(f"{name}={value!r} is not supported; use one of {', '.join(DTYPES)}")
        at_least_one = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size", "max_decode_steps")
        for name in (*at_least_one, "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}; "
                "every running request needs one token per iteration, so raise the first or lower the second"
            )
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization={self.gpu_memory_utilization}; it must be in (0, 1]")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EngineConfig:
        """Build from user keywords; an unknown one is refused by name."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(kwargs) - known):
            raise ValueError(f"unknown engine argument {unknown[0]!r}; known ones are {', '.join(sorted(known))}")
        return cls(**kwargs)
