"""What a model is: the mathematics of one decoder, and what it counts.

A Hugging Face `config.json` -> `ModelConfig` (through the family that knows its keys). Knows nothing of arrays,
devices or files.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.config.parts import (
    CacheRow,
    ClampedSwiglu,
    DynamicScaling,
    LatentAttention,
    LocalAttention,
    LongRopeScaling,
    Rope,
    RoutedExperts,
    Scaling,
    YarnScaling,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The mathematics of one decoder. Every field changes its output; there is no field that nothing reads.

    Attributes:
        norm: "rms", "layer" (with mean and bias) or "layer_no_bias".
        pre_norm, post_norm: a norm before each half of a block, after it, or both.
        parallel_block: both halves of a block read the same normed input; one norm and one sum.
        qk_norm: None, "head" (each head by itself), "full" (over all heads together) or "head_layer" (each head by
            itself, a layer norm with weights of its own).
        activation: "silu", "gelu", "gelu_tanh" or "relu"; `gated` says whether it gates a second product.
        embedding_scale: multiplies the embeddings. attention_scale: of the scores; None is `head_dim**-0.5`;
            `attention_scale_by_layer` divides it by the number of the layer, counted from 1.
        residual_scale: multiplies what each half of a block adds. logit_scale: multiplies the logits.
        attention_softcap, final_softcap: `cap * tanh(x / cap)` on scores and logits.
        attention_sinks: a learned logit per head that takes weight and gives nothing.
        rotary_dim: dims of a head that rotate, its first ones; 0 = none (`learned_positions` instead), None = all.
        rope_interleaved: dims 2i and 2i + 1 turn together instead of i and i + dim/2.
        unrotated_layers: layers without any position.
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
    rope_scaling: Scaling | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    unrotated_layers: tuple[int, ...] = ()
    learned_positions: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    norm: str = "rms"
    pre_norm: bool = True
    post_norm: bool = False
    parallel_block: bool = False
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    clamped_swiglu: ClampedSwiglu | None = None
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False
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
            "norm": ("rms", "layer", "layer_no_bias"),
            "qk_norm": (None, "head", "full", "head_layer"),
            "activation": ("silu", "gelu", "gelu_tanh", "relu"),
        }
        for name, known in words.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value!r} in the model's configuration; expected one of {known}")
        if not (self.pre_norm or self.post_norm):
            raise ValueError("pre_norm and post_norm are both off; a block needs one of them")
        if self.parallel_block and (self.post_norm or not self.pre_norm):
            raise ValueError("parallel_block has one norm, before both halves; set pre_norm and not post_norm")
        scaling, turning = self.rope_scaling, self.rope(0)
        if isinstance(scaling, LongRopeScaling) and turning:
            lengths = len(scaling.short_factors), len(scaling.long_factors)
            if lengths != (turning.dim // 2, turning.dim // 2):
                raise ValueError(
                    f"longrope has {lengths[0]} short and {lengths[1]} long factors; {turning.dim} rotary dims need "
                    f"{turning.dim // 2} of each"
                )
        if self.local and self.local.window < 1:
            raise ValueError(f"window={self.local.window} in the model's configuration; it must be at least 1")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face `config.json`. Raises ValueError for what this engine would compute wrongly."""
        # By name: whoever asks for this loads the families, and nothing else of this package depends on them.
        return importlib.import_module("jaxllm.families.registry").read_config(hf)

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
        dim = self.latent.rope_dim if self.latent else dim
        if not dim or layer in self.unrotated_layers:
            return None
        if self.window(layer) and self.local and self.local.rope_theta is not None:
            return Rope(dim=dim, theta=self.local.rope_theta, scaling=None)
        return Rope(dim=dim, theta=self.rope_theta, scaling=self.rope_scaling)

    @property
    def position_limit(self) -> int:
        """The longest sequence that may be asked for: some scalings reach further than `max_position_embeddings`."""
        match self.rope_scaling:
            case DynamicScaling(factor=factor, original_max_position=original):
                return max(self.max_position_embeddings, int(factor * original))
            case YarnScaling(factor=factor, original_max_position=original):
                return max(self.max_position_embeddings, int(factor * original))
        return self.max_position_embeddings

    @property
    def length_scaling(self) -> LongRopeScaling | DynamicScaling | None:
        """The scaling that depends on the longest sequence served, where there is one."""
        scaling = self.rope_scaling
        return scaling if isinstance(scaling, LongRopeScaling | DynamicScaling) else None

    def is_routed(self, layer: int) -> bool:
        """Whether this layer's FFN is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def score_scale(self, layer: int) -> float:
        """What attention scores of this layer are multiplied by."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.attention_scale_by_layer else scale

    @property
    def num_parameters(self) -> int:
        """Elements of all weights, tied ones counted once."""
        return self._tables() + sum(self._block(i, active=False) for i in range(self.num_layers))

    @property
    def num_active_parameters(self) -> int:
        """Elements of the weights that one token meets: of the routed experts only those it is sent to."""
        return self._tables() + sum(self._block(i, active=True) for i in range(self.num_layers))

    @property
    def cache_row(self) -> CacheRow:
        """What one token leaves in the cache of each layer."""
        if self.latent:
            return CacheRow(halves=1, heads=1, width=self.latent.cache_width, is_cut=False)
        return CacheRow(halves=2, heads=self.num_kv_heads, width=self.head_dim, is_cut=True)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token occupies over all layers (K_tok of the roofline)."""
        return self.num_layers * self.cache_row.numbers * itemsize

    def _tables(self) -> int:
        d = self.hidden_size
        tables = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return tables + self._norm() + (self.max_position_embeddings * d if self.learned_positions else 0)

    def _norm(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    def _block(self, layer: int, *, active: bool) -> int:
        d, halves = self.hidden_size, 1 if self.parallel_block else 2
        norms = halves * (self.pre_norm + self.post_norm) * self._norm()
        attention = self._latent_attention(self.latent) if self.latent else self._attention()
        if self.experts is None or not self.is_routed(layer):
            return norms + attention + self._ffn(self.intermediate_size, bias=self.mlp_bias)
        e = self.experts
        router = e.num_experts * (d + e.correction_bias + e.bias)
        shared = self._ffn(e.shared_size, bias=self.mlp_bias) + d * e.shared_gate if e.shared_size else 0
        count = e.per_token if active else e.num_experts
        return norms + attention + router + shared + count * self._ffn(e.ffn_size, bias=e.bias)

    def _ffn(self, size: int, *, bias: bool) -> int:
        ups = 2 if self.gated else 1
        return (ups + 1) * self.hidden_size * size + (ups * size + self.hidden_size if bias else 0)

    def _attention(self) -> int:
        d, n, k, h = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        norms = {None: 0, "head": 2 * h}.get(self.qk_norm, (n + k) * h)
        biases = (n + 2 * k) * h * self.qkv_bias + d * self.out_bias + n * self.attention_sinks
        return d * h * (n + 2 * k) + n * h * d + norms + biases

    def _latent_attention(self, a: LatentAttention) -> int:
        d, n, q_width = self.hidden_size, self.num_heads, a.nope_dim + a.rope_dim
        queries = d * n * q_width if a.q_rank is None else a.q_rank * (d + 1 + n * q_width)
        keys = d * a.cache_width + a.kv_rank + a.kv_rank * n * (a.nope_dim + a.value_dim)
        return queries + keys + n * a.value_dim * d
