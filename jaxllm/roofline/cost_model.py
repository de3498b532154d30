"""FLOPs and bytes of one iteration, and the least time they take: a model and its rows -> numbers. Plain Python.

Two models of the same thing. `linear_cost` is the formula one does in one's head: every parameter is read once and
multiplies every token, attention costs bytes but no FLOPs. `iteration_cost` counts what one iteration does:
attention by (query, key) pairs, the LM head only for rows that sample, windows, experts. Activations are taken to
stay on the chip, so the bytes are a lower bound.

Symbols: Π parameters, T tokens of the iteration, B rows, K_tok bytes of keys and values per token, C peak FLOP/s,
W bytes/s of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.config import ModelConfig

# Of a number; int4 with a 16-bit scale for each group of 128.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1, "int4": 0.5 + 2 / 128}
QUANTIZED = {"int8": "int8", "int4": "int4", "fp8": "float8"}  # what --quantization makes of weights, in `ITEM_BYTES`
Row = tuple[int, int]  # query tokens; keys and values once these are written: prefix and own


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one iteration, over all devices."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Lower bound: compute and memory overlap perfectly."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)

    def bound(self, ridge: float) -> str:
        """Which roof it meets: "compute" or "memory"."""
        return "compute" if self.intensity >= ridge else "memory"


def linear_cost(parameters: float, weight_bytes: float, kv_token_bytes: float, *, tokens: int, cached: float) -> Cost:
    """`FLOPs = 2ΠT`, `bytes = weight_bytes + K_tok·cached`.

    Decode: `tokens` is B and `cached` context times B. Prefill of one chunk: its tokens, and the prefix it stands on.
    With 2-byte weights `weight_bytes` is 2Π.
    """
    return Cost(2 * parameters * tokens, weight_bytes + kv_token_bytes * cached)


def crossing_tokens(weight_bytes: float, kv_token_bytes: float) -> float:
    """Tokens in the cache (context times batch) at which keys and values weigh as much as the weights."""
    return weight_bytes / kv_token_bytes


def step_seconds(
    *, tokens: int, kv_bytes: float, parameters: float, weight_bytes: float, flops_per_s: float, bytes_per_s: float
) -> float:
    """`kv_bytes/W + max(2·tokens·Π/C, weight_bytes/W)`: attention bound by memory, then the matrices by either.

    `kv_bytes` of all rows together (B·KV). With few tokens it is `(B·KV + weight_bytes)/W`.
    """
    return kv_bytes / bytes_per_s + max(2 * tokens * parameters / flops_per_s, weight_bytes / bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What the cost of an iteration depends on. Bytes are over all devices, copies counted; FLOPs are not repeated.

    Attributes:
        token_flops: of the blocks' matrices, per token.
        head_flops: of the LM head, per sampling row.
        pair_flops: of attention, per (query, key) pair and layer.
        block_bytes: weights that every iteration reads; routed experts and tables excluded.
        expert_bytes: all routed experts, of which `1 - (1 - experts_per_token/num_experts)^T` are read.
        head_bytes: read when a row samples.
        embedding_row_bytes: read per token.
        kv_bytes: keys and values of one token in one layer.
        attention: how many layers see at most how many keys (None: all).
    """

    token_flops: float
    head_flops: float
    pair_flops: float
    block_bytes: float
    head_bytes: float
    embedding_row_bytes: float
    kv_bytes: float
    attention: tuple[tuple[int | None, int], ...]
    expert_bytes: float = 0.0
    experts_touched: float = 1.0  # by one token: experts per token over experts

    def cost(self, *, tokens: int, samples: int, pairs: float, keys: float, passes: int = 1) -> Cost:
        """From sums over rows: `pairs` and `keys` are those of `attended`, `passes` reads of the weights."""
        experts = self.expert_bytes * (1 - (1 - self.experts_touched) ** (tokens / max(1, passes)))
        weights = self.block_bytes + experts + (self.head_bytes if samples else 0)
        return Cost(
            self.token_flops * tokens + self.head_flops * samples + self.pair_flops * pairs,
            weights * passes + self.embedding_row_bytes * tokens + self.kv_bytes * keys,
        )

    def attended(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(query, key) pairs of these rows, and keys read or written for them, summed over layers."""
        pairs = keys = 0
        for window, layers in self.attention:
            if window is None:
                pairs += layers * sum([q * (2 * kv - q + 1) for q, kv in rows]) // 2
                keys += layers * sum([kv for _, kv in rows])
            else:
                pairs += layers * sum([_seen(kv, window) - _seen(kv - q, window) for q, kv in rows])
                keys += layers * sum([min(kv, window + q - 1) for q, kv in rows])
        return pairs, keys


def _seen(length: int, window: int) -> int:
    """Pairs of a whole prompt in one layer: each token sees itself and at most `window - 1` before it."""
    full = min(length, window)
    return full * (full + 1) // 2 + (length - full) * window


def model_cost(
    cfg: ModelConfig,
    *,
    weight_dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    kv_copies: int = 1,
    replicas: int = 1,
) -> ModelCost:
    """The numbers of a configuration.

    Args:
        cfg: the model.
        weight_dtype, kv_dtype: keys of `ITEM_BYTES`.
        kv_copies: how often each key/value head is stored (tensor parallelism over more devices than heads).
        replicas: how often the whole model is stored and read (data parallelism).
    """
    weight = ITEM_BYTES[weight_dtype] * replicas
    head = cfg.vocab_size * cfg.hidden_size
    positions = cfg.max_position_embeddings * cfg.hidden_size if cfg.learned_positions else 0
    tables = head * (1 if cfg.tie_word_embeddings else 2) + positions
    active = active_parameters(cfg)
    experts = cfg.experts
    share = experts.per_token / experts.num_experts if experts else 1.0
    # The blocks but for the experts a token is not sent to: (all - active) is that share of all experts.
    routed = (cfg.num_parameters - active) / (1 - share) if share < 1 else 0.0
    return ModelCost(
        token_flops=2 * (active - tables),
        head_flops=2 * head,
        pair_flops=pair_flops(cfg),
        block_bytes=weight * (cfg.num_parameters - tables - routed),
        head_bytes=weight * head,
        embedding_row_bytes=weight * cfg.hidden_size,
        kv_bytes=cfg.kv_bytes_per_token(ITEM_BYTES[kv_dtype]) / cfg.num_layers * kv_copies * replicas,
        attention=attention_windows(cfg),
        expert_bytes=weight * routed,
        experts_touched=share,
    )


def active_parameters(cfg: ModelConfig) -> int:
    """Weights that one token meets: all of them, or of routed experts those it is sent to."""
    return cfg.num_active_parameters


def pair_flops(cfg: ModelConfig) -> float:
    """FLOPs of one (query, key) pair in one layer: a score and a weighted value for each query head."""
    latent = cfg.latent
    if latent:  # scores on the whole compressed row, values on its part without positions
        return 2 * cfg.num_heads * (latent.cache_width + latent.kv_rank)
    return 4 * cfg.num_heads * cfg.head_dim


def attention_windows(cfg: ModelConfig) -> tuple[tuple[int | None, int], ...]:
    """`(window, number of layers)`: all layers without a window, then those with one."""
    local = cfg.local
    windowed = len(local.layers) if local else 0
    groups = ((None, cfg.num_layers - windowed), (local.window if local else None, windowed))
    return tuple((window, layers) for window, layers in groups if layers)


def iteration_cost(model: ModelCost, rows: Sequence[Row], *, samples: int | None = None) -> Cost:
    """Cost of one iteration over these rows; by default every row samples one token."""
    for queries, kv_length in rows:
        if not 1 <= queries <= kv_length:
            raise ValueError(f"a row of {queries} query tokens and {kv_length} keys; need 1 <= queries <= keys")
    pairs, keys = model.attended(rows)
    count = len(rows) if samples is None else samples
    return model.cost(tokens=sum(queries for queries, _ in rows), samples=count, pairs=pairs, keys=keys)
