"""Sampling on the device: logits `[R, V]` and each row's parameters -> one token per row.

Order as in vLLM: penalties, logit bias, minimum length, allowed tokens, temperature, min-p, top-k, top-p, draw. The
draw is a Gumbel maximum whose noise is a function of (seed, position) alone, so a request's tokens do not depend on
what else is in the batch. Steps that no row asks for are skipped at run time (`lax.cond`), not compiled apart.

Dimension letters: R rows, V vocabulary, L positions of the token history,
W = ceil(V / 32) words of a bit mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config.sampling import MAX_LOGPROBS

_NEVER = -jnp.inf
IDLE, NOT_FINITE = -1, -2  # in place of a token: the row was idle; its logits are no finite numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingRows:
    """What each row asks for: int32 or float32 `[R]`, except the bias lists `[R, 300]`, the upper and lower half of
    each `seed`, uint32 `[R, 2]`, and the bit masks `allowed`, int32 `[R, W]`, which count only where `masked`.

    `prompt_len` is where output begins in the row's history, `min_len` the length before which no stop token may
    be sampled. Unused bias entries have an id beyond the vocabulary.
    """

    temperature: Any
    top_p: Any
    min_p: Any
    presence: Any
    frequency: Any
    repetition: Any
    top_k: Any
    seed: Any
    prompt_len: Any
    min_len: Any
    num_logprobs: Any
    bias_ids: Any
    bias_values: Any
    masked: Any
    allowed: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens int32 `[R]`; with logprobs also the token's own and the best alternatives `[R, 20]`."""

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample_greedy(logits_RV: jax.Array) -> Sampled:
    """The most likely token of every row, `NOT_FINITE` where there is none."""
    best, tops = _argmax(logits_RV)
    return Sampled(_or_not_finite(best, tops))


def sample(
    logits_RV: jax.Array, rows: SamplingRows, history_RL: jax.Array, length_R: jax.Array, stop_ids: jax.Array
) -> Sampled:
    """Sample one token per row, `NOT_FINITE` where its logits are no finite numbers.

    Args:
        logits_RV: float32.
        rows: parameters.
        history_RL: the rows' tokens so far; entries at or beyond `length_R` mean nothing. One for each row, or for as
            many rows in a row as share it.
        length_R: tokens so far, which is also the position of the token that is sampled.
        stop_ids: int32 `[R, X]`, tokens that may not come before `min_len`; -1 fills up.
    """
    x = _when(jnp.any(_penalised(rows)), _apply_penalties, logits_RV, rows, history_RL, length_R)
    x = _when(jnp.any(rows.bias_ids < x.shape[1]), _apply_bias, x, rows)
    x = _when(jnp.any(length_R < rows.min_len), _forbid_stops, x, stop_ids, length_R < rows.min_len)
    x = _when(jnp.any(rows.masked), _forbid_masked, x, rows)
    best, _ = _argmax(x)
    greedy = rows.temperature == 0.0
    drawn = jax.lax.cond(jnp.all(greedy), lambda *_: best, _draw, x, rows, length_R)
    tokens = _or_not_finite(jnp.where(greedy, best, drawn), _tops(_blocks(logits_RV)))
    return jax.lax.cond(jnp.any(rows.num_logprobs >= 0), with_logprobs, _without_logprobs, logits_RV, tokens)


def _when(wanted: jax.Array, function, x: jax.Array, *args) -> jax.Array:
    return jax.lax.cond(wanted, function, lambda x, *_: x, x, *args)


def _penalised(rows: SamplingRows) -> jax.Array:
    return (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)


def _apply_penalties(x: jax.Array, rows: SamplingRows, history: jax.Array, length: jax.Array) -> jax.Array:
    """Repetition (CTRL, Keskar et al. 2019) over prompt and output; presence and frequency over the output."""
    history = jnp.repeat(history, x.shape[0] // history.shape[0], axis=0)
    index = jnp.arange(history.shape[1])
    known = index < length[:, None]
    is_output = known & (index >= rows.prompt_len[:, None])

    def count(mask: jax.Array) -> jax.Array:
        ids = jnp.where(mask, history, x.shape[1])
        return jnp.zeros(x.shape).at[jnp.arange(x.shape[0])[:, None], ids].add(1.0, mode="drop")

    seen, outputs = count(known) > 0, count(is_output)
    factor = jnp.where(seen, rows.repetition[:, None], 1.0)
    x = jnp.where(x > 0, x / factor, x * factor)
    return x - rows.frequency[:, None] * outputs - rows.presence[:, None] * (outputs > 0)


def _apply_bias(x: jax.Array, rows: SamplingRows) -> jax.Array:
    return x.at[jnp.arange(x.shape[0])[:, None], rows.bias_ids].add(rows.bias_values, mode="drop")


def _forbid_stops(x: jax.Array, stop_ids: jax.Array, rows: jax.Array) -> jax.Array:
    ids = jnp.where(rows[:, None] & (stop_ids >= 0), stop_ids, x.shape[1])
    return x.at[jnp.arange(x.shape[0])[:, None], ids].set(_NEVER, mode="drop")


def _forbid_masked(x: jax.Array, rows: SamplingRows) -> jax.Array:
    token = jnp.arange(x.shape[1])
    bits = rows.allowed[:, token // 32] >> (token % 32)
    return jnp.where((bits & 1 == 1) | ~rows.masked[:, None], x, _NEVER)


def _draw(x: jax.Array, rows: SamplingRows, position: jax.Array) -> jax.Array:
    x = x / jnp.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
    x = _when(jnp.any(rows.min_p > 0), _min_p, x, rows.min_p)
    x = _when(jnp.any(rows.top_k > 0), _top_k, x, rows.top_k)
    x = _when(jnp.any(rows.top_p < 1), _top_p, x, rows.top_p)

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")  # of a small seed: the same as `jax.random.key`'s
        return jax.random.gumbel(jax.random.fold_in(key, position), x.shape[1:])

    return _argmax(x + jax.vmap(noise)(rows.seed, position))[0]


def _argmax(x_RV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of the maximum, and `_tops`.

    In two levels: 30 times as fast as one `argmax` over a vocabulary on a CPU.
    """
    blocks = _blocks(x_RV)
    tops = _tops(blocks)
    block = jnp.argmax(tops, axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return block * 128 + within, tops


def _blocks(x_RV: jax.Array) -> jax.Array:
    rows, width = x_RV.shape
    return jnp.pad(x_RV, ((0, 0), (0, -width % 128)), constant_values=_NEVER).reshape(rows, -1, 128)


def _tops(blocks: jax.Array) -> jax.Array:
    """The maximum of each block, infinity where one of its values is NaN: XLA's own maximum may lose a NaN."""
    return jnp.max(jnp.where(blocks < jnp.inf, blocks, jnp.inf), axis=-1)


def _or_not_finite(tokens: jax.Array, tops: jax.Array) -> jax.Array:
    """The tokens, except where a logit is NaN or infinite, or all are minus infinity."""
    return jnp.where(jnp.isfinite(jnp.max(tops, axis=-1)), tokens, NOT_FINITE).astype(jnp.int32)


def _min_p(x: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drop tokens less likely than `min_p` times the likeliest (Nguyen et al. 2024)."""
    floor = jnp.max(x, axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(x < floor, _NEVER, x)


def _top_k(x: jax.Array, k: jax.Array) -> jax.Array:
    """Keep the `k` largest (and what ties with the last); k < 1 keeps all."""
    k = jnp.where(k < 1, x.shape[1], k)
    threshold = _largest_threshold(x, lambda keep: jnp.sum(keep, axis=-1) >= jnp.minimum(k, x.shape[1]))
    return jnp.where(_ordered(x) < threshold[:, None], _NEVER, x)


def _top_p(x: jax.Array, p: jax.Array) -> jax.Array:
    """Keep the smallest set of likeliest tokens whose mass reaches `p` (Holtzman et al. 2020)."""
    probs = jax.nn.softmax(x, axis=-1)
    threshold = _largest_threshold(x, lambda keep: jnp.sum(jnp.where(keep, probs, 0.0), axis=-1) >= p)
    kept = _ordered(x) >= threshold[:, None]
    return jnp.where(kept | (p >= 1)[:, None], x, _NEVER)


def _ordered(x: jax.Array) -> jax.Array:
    """Map float32 to uint32 so that order is kept."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(x: jax.Array, enough) -> jax.Array:
    """Largest value (as ordered bits, per row) such that the entries at or above it are `enough`.

    Bisects the 32 bits instead of sorting: exact, and XLA's sort of a vocabulary is slow on every backend.
    """
    bits = _ordered(x)

    def refine(i: jax.Array, low: jax.Array) -> jax.Array:
        candidate = low | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(bits >= candidate[:, None]), candidate, low)

    return jax.lax.fori_loop(0, 32, refine, jnp.zeros(x.shape[0], jnp.uint32))


def with_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    """Log-probabilities of the raw logits, before penalties and temperature."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    top, ids = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    missing = MAX_LOGPROBS - ids.shape[1]
    pad = ((0, 0), (0, missing))
    return Sampled(tokens, own, jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(top, pad, constant_values=_NEVER))


def _without_logprobs(logits: jax.Array, tokens: jax.Array) -> Sampled:
    shape = (logits.shape[0], MAX_LOGPROBS)
    return Sampled(tokens, jnp.zeros(shape[0]), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
