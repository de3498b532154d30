"""Parts of a model that some families have: rotary scalings, local and latent attention, routed experts.

Numbers in, frozen dataclasses out. Knows nothing of checkpoints, arrays or devices.
"""

from __future__ import annotations

from dataclasses import dataclass


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
class LongRopeScaling:
    """Every frequency divided by a factor of its own: by `short_factors` while no sequence is longer than
    `original_max_position`, else by `long_factors`; cosines and sines are multiplied by `attention_factor` (LongRoPE,
    Ding et al. 2024)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position: int
    attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """A base that grows with the longest sequence once that exceeds `original_max_position` ("dynamic NTK")."""

    factor: float
    original_max_position: int


Scaling = RopeScaling | LinearScaling | YarnScaling | LongRopeScaling | DynamicScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one layer: how many dims of a head turn, and how fast."""

    dim: int
    theta: float
    scaling: Scaling | None


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
    shared_gate: bool = False  # its output is weighed by a sigmoid of its own
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
class CacheRow:
    """What one token leaves in the cache of one layer, as the layer's kind of attention has it.

    Attributes:
        halves: 2: a key and a value; 1: one row that serves as both.
        heads: key/value heads, each with a row of its own.
        width: numbers in a row.
        is_cut: whether devices may share the heads; a row that belongs to every query head lies whole on each.
    """

    halves: int
    heads: int
    width: int
    is_cut: bool

    @property
    def num_rows(self) -> int:
        """Rows of numbers; each has a scale of its own in an 8-bit cache."""
        return self.halves * self.heads

    @property
    def numbers(self) -> int:
        """Numbers of one token in one layer."""
        return self.num_rows * self.width
