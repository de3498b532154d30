"""An `IterationPlan` -> the flat NumPy arrays that one compiled program takes.

Static shapes in few sizes: tokens are padded to a token bucket, sampling rows to a row bucket. With several
data-parallel replicas every array is a row of equal sections, one per replica, so that a device finds its own
tokens, rows and pages in its own part. Knows requests and plans on one side and array layouts on the other;
nothing of devices.

Dimension letters: T tokens (bucket), R rows, M pages per row, X stop ids, Z replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.config.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxllm.runner.sampler import SamplingRows
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Chunk, IterationPlan

Array = Any  # NumPy on the host, traced inside a compiled program
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + 8  # the user's and the model's own


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """One ragged step. int32; `tokens` are read on the device from each slot's history.

    Attributes:
        token_row, token_position: `[T]`, which row a token belongs to and where in its sequence it stands.
        num_tokens: scalar; tokens at or beyond it are padding. `[Z]` with several replicas, for each section.
        slot, q_start, q_len, kv_len: `[R]` per row; `num_single` (`[Z]`) rows of one query come first. `q_start`
            counts from the section's own first token.
        page_table: `[R, M]`, numbers of the replica's own pages.
        sample_at: `[R]`, flat index of each sampling row's last token, in the order of the sampling rows.
    """

    token_row: Array
    token_position: Array
    num_tokens: Array
    slot: Array
    q_start: Array
    q_len: Array
    kv_len: Array
    num_single: Array
    page_table: Array
    sample_at: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RowBatch:
    """The rows of one sampling step or decode loop, `[R]` each.

    Attributes:
        slot: row of the per-slot state; the spare slot marks padding.
        length: tokens each row has; the token at `length - 1` is the last known one.
        limit: length at which the row stops.
        stop_ids: `[R, X]`, -1 fills up.
        sampling: parameters, or None where every row is plainly greedy.
    """

    slot: Array
    length: Array
    limit: Array
    stop_ids: Array
    sampling: SamplingRows | None


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


def by_replica(chunks: Sequence[Chunk], num_replicas: int) -> list[Sequence[Chunk]]:
    """The chunks of each replica, in their order."""
    if num_replicas == 1:
        return [chunks]
    parts: list[list[Chunk]] = [[] for _ in range(num_replicas)]
    for chunk in chunks:
        parts[chunk.request.replica].append(chunk)
    return list(parts)


def fullest(chunks: Sequence[Chunk], num_replicas: int) -> int:
    """Rows of the replica that has most."""
    return max(map(len, by_replica(chunks, num_replicas)))


def row_numbers(chunks: Sequence[Chunk], num_rows: int, num_replicas: int) -> Sequence[int]:
    """In which row of the sections (of `num_rows` each) every chunk stands."""
    if num_replicas == 1:
        return range(len(chunks))
    at = {
        id(c): z * num_rows + i for z, part in enumerate(by_replica(chunks, num_replicas)) for i, c in enumerate(part)
    }
    return [at[id(chunk)] for chunk in chunks]


def page_tables(chunks: Sequence[Chunk], num_rows: int, width: int, num_replicas: int = 1) -> np.ndarray:
    """`[R, M]` page numbers of the chunks' requests, `num_rows` rows for each replica."""
    parts = by_replica(chunks, num_replicas)
    return np.concatenate([page_table([chunk.request for chunk in part], num_rows, width) for part in parts])


def page_table(requests: Sequence[Request], num_rows: int, width: int) -> np.ndarray:
    """`[R, M]` page numbers, zero where a row has none."""
    table = np.zeros((num_rows, width), np.int32)
    for row, request in enumerate(requests):
        table[row, : len(request.pages)] = request.pages
    return table


def ragged_batch(plan: IterationPlan, num_tokens: int, num_rows: int, width: int, num_replicas: int = 1) -> RaggedBatch:
    """Lay the plan's chunks end to end: one row per chunk, one entry per token; sizes are those of one replica."""
    parts = [_section(part, num_tokens, num_rows, width) for part in by_replica(plan.chunks, num_replicas)]
    if num_replicas == 1:
        return parts[0]
    for z, part in enumerate(parts):
        part.token_row[:] += z * num_rows
        part.sample_at[:] += z * num_tokens
    return jax.tree.map(lambda *sections: np.concatenate([np.atleast_1d(a) for a in sections]), *parts)


def _section(chunks: Sequence[Chunk], num_tokens: int, num_rows: int, width: int) -> RaggedBatch:
    counts = np.array([chunk.count for chunk in chunks], np.int32)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    offsets = np.cumsum(counts, dtype=np.int32) - counts
    total, rows = int(counts.sum()), len(counts)
    token_row = np.repeat(np.arange(rows, dtype=np.int32), counts)
    position = np.arange(total, dtype=np.int32) - (offsets - starts)[token_row]
    ends = [int(offsets[i] + counts[i]) - 1 for i, chunk in enumerate(chunks) if chunk.num_samples]
    return RaggedBatch(
        token_row=_pad(token_row, num_tokens),
        token_position=_pad(position, num_tokens),
        num_tokens=np.int32(total),
        slot=_pad([chunk.request.slot for chunk in chunks], num_rows),
        q_start=_pad(offsets, num_rows),
        q_len=_pad(counts, num_rows),
        kv_len=_pad(starts + counts, num_rows),
        num_single=np.int32((counts == 1).sum()),
        page_table=page_table([chunk.request for chunk in chunks], num_rows, width),
        sample_at=_pad(ends, num_rows),
    )


def row_batch(
    chunks: Sequence[Chunk], num_rows: int, spare_slot: int, vocab_size: int, num_replicas: int = 1, *,
    greedy: bool = True,
) -> RowBatch:  # fmt: skip
    """The sampling rows of a plan, `num_rows` for each replica: `length` is where each row's next token goes.

    Where `greedy` allows it, rows that are all plainly greedy need no sampling parameters.
    """
    greedy = greedy and all(chunk.request.params.plain_greedy for chunk in chunks)
    parts = [_rows(part, num_rows, spare_slot, vocab_size, greedy) for part in by_replica(chunks, num_replicas)]
    return parts[0] if num_replicas == 1 else jax.tree.map(lambda *sections: np.concatenate(sections), *parts)


def _rows(chunks: Sequence[Chunk], num_rows: int, spare_slot: int, vocab_size: int, greedy: bool) -> RowBatch:
    requests = [chunk.request for chunk in chunks]
    stop_ids = np.full((num_rows, MAX_STOP_IDS), -1, np.int32)
    for row, request in enumerate(requests):
        ids = sorted(request.stop_ids)[:MAX_STOP_IDS]
        stop_ids[row, : len(ids)] = ids
    return RowBatch(
        slot=_pad([request.slot for request in requests], num_rows, fill=spare_slot),
        length=_pad([chunk.start + chunk.count for chunk in chunks], num_rows, fill=1),
        limit=_pad([request.limit for request in requests], num_rows),
        stop_ids=stop_ids,
        sampling=None if greedy else sampling_rows(requests, num_rows, vocab_size),
    )


def sampling_rows(requests: Sequence[Request], num_rows: int, vocab_size: int) -> SamplingRows:
    """The requests' sampling parameters as arrays; padding rows are greedy."""
    params = [request.params for request in requests]
    masked = [request.constraint is not None for request in requests]
    allowed = np.zeros((num_rows, -(-vocab_size // 32)), np.int32)
    for row, request in enumerate(requests):
        if request.constraint is not None:
            request.constraint.fill_mask(allowed[row])
    bias_ids = np.full((num_rows, MAX_LOGIT_BIAS), vocab_size, np.int32)
    bias_values = np.zeros((num_rows, MAX_LOGIT_BIAS), np.float32)
    for row, p in enumerate(params):
        if p.logit_bias:
            bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
            bias_values[row, : len(p.logit_bias)] = list(p.logit_bias.values())

    def floats(name: str, fill: float) -> np.ndarray:
        return _pad([getattr(p, name) for p in params], num_rows, fill, np.float32)

    return SamplingRows(
        temperature=floats("temperature", 0.0),
        top_p=floats("top_p", 1.0),
        min_p=floats("min_p", 0.0),
        presence=floats("presence_penalty", 0.0),
        frequency=floats("frequency_penalty", 0.0),
        repetition=floats("repetition_penalty", 1.0),
        top_k=_pad([min(p.top_k, vocab_size) for p in params], num_rows),
        seed=_seeds(requests, num_rows),
        prompt_len=_pad([request.num_prompt for request in requests], num_rows),
        min_len=_pad([r.num_prompt + r.params.min_tokens for r in requests], num_rows),
        num_logprobs=_pad([-1 if p.logprobs is None else p.logprobs for p in params], num_rows, -1),
        bias_ids=bias_ids,
        bias_values=bias_values,
        masked=_pad(masked, num_rows, False, np.bool_),
        allowed=allowed,
    )


def _seeds(requests: Sequence[Request], num_rows: int) -> np.ndarray:
    """Upper and lower half of each seed modulo 2^64."""
    seeds = np.zeros((num_rows, 2), np.uint32)
    for row, request in enumerate(requests):
        seeds[row] = request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
    return seeds


def _pad(values: Sequence | np.ndarray, size: int, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
    out = np.full(size, fill, dtype)
    out[: len(values)] = values
    return out
