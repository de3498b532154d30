"""An `IterationPlan` -> what is dispatched for it: programs, buckets, and the flat NumPy arrays that they take.

Static shapes in few sizes: tokens are padded to a token bucket, sampling rows to a row bucket. With several
data-parallel replicas every array is a row of equal sections, one per replica, so that a device finds its own
tokens, rows and pages in its own part. Knows requests and plans on one side and array layouts on the other;
nothing of devices.

Dimension letters: T tokens (bucket), R rows, M pages per row, X stop ids, Z replicas, G pages or masks set together,
W words of a bit mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxllm.config.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.runner.sampler import SamplingRows
from jaxllm.runner.shapes import RunnerShapes, bucket_for
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Request

Array = Any  # NumPy on the host, traced inside a compiled program
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + 8  # the user's and the model's own
MASK_BATCH = 8  # masks of one dispatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """One ragged step. int32; `tokens` are read on the device from each slot's history.

    Attributes:
        token_row, token_position: `[T]`, which row a token belongs to and where in its sequence it stands.
        num_tokens: `[Z]`; a section's tokens at or beyond it are padding.
        slot, q_start, q_len, kv_len: `[R]` per row; of each section `num_single` (`[Z]`) rows of one query come first.
            `q_start` counts from the section's own first token.
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
        limit: length at which the row stops.
        stop_ids: `[R, X]`, -1 fills up.
        sampling: parameters, or None where every row is plainly greedy. Its masks lie in the slots.
    """

    slot: Array
    limit: Array
    stop_ids: Array
    sampling: SamplingRows | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Drafting:
    """What the host says of the drafts of a decode loop.

    Attributes:
        most: int32 `[R]`, drafts of each row and iteration at most.
        price: float32, what an iteration that verifies costs beyond a plain one, in plain ones, for each row.
        is_given: bool `[R]`, rows whose `most` drafts the host has made: `given` int32 `[R, G]`, the first `num_sure`
            `[R]` of them forced by a grammar.
    """

    most: Array
    price: Array
    is_given: Array
    given: Array
    num_sure: Array


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One call of a compiled program (see `programs`): its name, its bucket, and what the host gives it."""

    program: str
    bucket: int
    inputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """All that is dispatched for one plan, in order; `rows` says where each of the `sampling` chunks stands."""

    dispatches: list[Dispatch]
    sampling: list[Chunk]
    rows: list[int]


def lay_out(
    plan: IterationPlan, shapes: RunnerShapes, price: Callable[[int], float] = lambda _: 0.0, *, drafts: bool = True
) -> Layout:
    """Everything an iteration needs, in the order in which the device must do it.

    For `price` see `Drafting`. Without `drafts` a loop is a plain one, whatever its plan has room for.
    """
    sampling = [chunk for chunk in plan.chunks if chunk.num_samples]
    sections = by_replica(sampling, shapes)
    bucket = bucket_for(max(map(len, sections)), shapes.row_buckets)
    at = _row_numbers(sections, bucket)
    rows = [at[id(chunk)] for chunk in sampling]
    dispatches = [*_loads(plan), *_copies(plan.copies), *(admission(request, shapes) for request in plan.admitted)]
    dispatches += _masks(sampling, shapes)
    if not plan.is_decode_loop:
        dispatches.append(_ragged(plan.chunks, shapes))
    if sampling:
        batch = row_batch(sampling, rows, shapes.num_replicas * bucket, shapes)
        suffix = "_greedy" if batch.sampling is None else ""
        if plan.is_decode_loop:
            table = page_table((c.request for c in sampling), rows, len(batch.slot), shapes.pages_per_row)
            inputs = batch, table, np.int32(plan.num_steps)
            if drafts and shapes.speculates(bucket) and any(chunk.num_drafts for chunk in sampling):
                size = len(batch.slot)
                drafted = drafting(sampling, rows, size, shapes, price(size))
                dispatches.append(Dispatch(f"speculate{suffix}", bucket, (*inputs, drafted)))
            else:
                dispatches.append(Dispatch(f"decode{suffix}", bucket, inputs))
        else:
            dispatches.append(Dispatch(f"sample{suffix}", bucket, (batch,)))
    return Layout(dispatches, sampling, rows)


def drafting(
    chunks: Sequence[Chunk], rows: Sequence[int], num_rows: int, shapes: RunnerShapes, price: float
) -> Drafting:
    """What the rows of a decode loop may draft."""
    given = np.zeros((num_rows, shapes.num_drafts), np.int32)
    for chunk, row in zip(chunks, rows, strict=True):
        if chunk.guess is not None:
            given[row, : chunk.num_drafts] = chunk.guess.tokens
    return Drafting(
        most=_at(rows, [chunk.num_drafts for chunk in chunks], num_rows),
        price=np.float32(price),
        is_given=_at(rows, [chunk.guess is not None for chunk in chunks], num_rows, False, np.bool_),
        given=given,
        num_sure=_at(rows, [chunk.guess.num_sure if chunk.guess else 0 for chunk in chunks], num_rows),
    )


def _loads(plan: IterationPlan) -> list[Dispatch]:
    return [Dispatch("load_adapter", 1, (np.int32(slot), adapter.arrays)) for slot, adapter in plan.loads]


def lay_out_pass(plan: IterationPlan, shapes: RunnerShapes) -> list[Dispatch]:
    """A forward pass over one chunk of a request that samples nothing, and keeps every token's hidden state."""
    (chunk,) = plan.chunks
    bucket = bucket_for(chunk.count, shapes.scoring_buckets)
    batch = ragged_batch(by_replica([chunk], shapes), bucket, shapes)
    every_token = np.arange(bucket, dtype=np.int32)
    step = Dispatch("hidden", bucket, (replace(batch, sample_at=every_token),))
    return [*_loads(plan), admission(chunk.request, shapes), step]


def admission(request: Request, shapes: RunnerShapes) -> Dispatch:
    """The tokens of a request that is new to its slot, and where its adapter lies."""
    tokens_L = np.zeros(shapes.max_model_len, np.int32)
    tokens_L[: len(request.token_ids)] = request.token_ids
    length = np.int32(len(request.token_ids))
    return Dispatch("admit", 1, (np.int32(request.slot), tokens_L, length, np.int32(request.held.adapter_slot)))


def by_replica(chunks: Iterable[Chunk], shapes: RunnerShapes) -> list[list[Chunk]]:
    """The chunks of each replica, in their order."""
    sections: list[list[Chunk]] = [[] for _ in range(shapes.num_replicas)]
    for chunk in chunks:
        sections[chunk.request.replica].append(chunk)
    return sections


def _row_numbers(sections: Sequence[Sequence[Chunk]], num_rows: int) -> dict[int, int]:
    """In which row each chunk (by identity) stands where every section has `num_rows`."""
    return {id(chunk): z * num_rows + i for z, part in enumerate(sections) for i, chunk in enumerate(part)}


def _copies(pairs: Sequence[tuple[int, int]]) -> Iterator[Dispatch]:
    for i in range(0, len(pairs), MOVE_BATCH):
        sides = zip(*pairs[i : i + MOVE_BATCH], strict=True)
        yield Dispatch("copy", MOVE_BATCH, tuple(padded_pages(side) for side in sides))


def padded_pages(pages: Sequence[int]) -> np.ndarray:
    """Page numbers as the programs that move pages take them `[G]`; page 0 belongs to nobody."""
    return _pad(pages, MOVE_BATCH)


def _masks(chunks: Iterable[Chunk], shapes: RunnerShapes) -> Iterator[Dispatch]:
    """The bit masks of the next token and of those after each draft, into the slots of requests with a constraint."""
    constrained = [chunk for chunk in chunks if chunk.request.constraint is not None]
    for i in range(0, len(constrained), MASK_BATCH):
        batch = constrained[i : i + MASK_BATCH]
        masks_GJW = np.zeros((MASK_BATCH, 1 + shapes.num_drafts, shapes.mask_words), np.int32)
        for masks_JW, chunk in zip(masks_GJW, batch, strict=False):
            _fill_masks(masks_JW, chunk)
        slots = _pad([chunk.request.slot for chunk in batch], MASK_BATCH, fill=shapes.spare_slot)
        yield Dispatch("mask", MASK_BATCH, (slots, masks_GJW))


def _fill_masks(masks_JW: np.ndarray, chunk: Chunk) -> None:
    """Where no draft stands, and where tokens do not matter, the first mask stays."""
    constraint = chunk.request.constraint
    assert constraint is not None
    constraint.fill_mask(masks_JW[0])
    masks_JW[1:] = masks_JW[0]
    if chunk.guess is not None:
        constraint = constraint.copy()
        for mask, token in zip(masks_JW[1:], chunk.guess.tokens, strict=False):
            constraint.accept(token)
            constraint.fill_mask(mask)


def _ragged(chunks: Sequence[Chunk], shapes: RunnerShapes) -> Dispatch:
    sections = by_replica(chunks, shapes)
    most = max(sum(chunk.count for chunk in part) for part in sections)
    bucket = bucket_for(most, shapes.token_buckets)
    return Dispatch("ragged", bucket, (ragged_batch(sections, bucket, shapes),))


def ragged_batch(sections: Sequence[Sequence[Chunk]], num_tokens: int, shapes: RunnerShapes) -> RaggedBatch:
    """Lay each replica's chunks end to end: one row per chunk, one entry per token, `num_tokens` for each replica."""
    replicas, num_rows = len(sections), shapes.row_buckets[-1]
    tokens, rows = np.zeros((2, replicas, num_tokens), np.int32), np.zeros((5, replicas, num_rows), np.int32)
    token_row, token_position = tokens
    slot, q_start, q_len, kv_len, sample_at = rows
    totals, singles = np.zeros((2, replicas), np.int32)
    table = np.zeros((replicas * num_rows, shapes.pages_per_row), np.int32)
    for z, part in enumerate(sections):
        if not part:
            continue
        counts = np.array([chunk.count for chunk in part], np.int32)
        starts = np.array([chunk.start for chunk in part], np.int32)
        offsets = np.cumsum(counts, dtype=np.int32) - counts
        total, used = int(counts.sum()), len(part)
        of_token = np.repeat(np.arange(used, dtype=np.int32), counts)
        token_row[z, :total] = of_token
        token_row[z] += z * num_rows
        token_position[z, :total] = np.arange(total, dtype=np.int32) - (offsets - starts)[of_token]
        slot[z, :used] = [chunk.request.slot for chunk in part]
        q_start[z, :used], q_len[z, :used], kv_len[z, :used] = offsets, counts, starts + counts
        ends = [int(end) for end, chunk in zip(offsets + counts - 1, part, strict=True) if chunk.num_samples]
        sample_at[z, : len(ends)] = ends
        sample_at[z] += z * num_tokens
        totals[z], singles[z] = total, (counts == 1).sum() if shapes.singles_first else 0
        _fill_table(table[z * num_rows :], (chunk.request for chunk in part), range(used))
    return RaggedBatch(
        token_row=token_row.reshape(-1),
        token_position=token_position.reshape(-1),
        num_tokens=totals,
        slot=slot.reshape(-1),
        q_start=q_start.reshape(-1),
        q_len=q_len.reshape(-1),
        kv_len=kv_len.reshape(-1),
        num_single=singles,
        page_table=table,
        sample_at=sample_at.reshape(-1),
    )


def page_table(requests: Iterable[Request], rows: Iterable[int], num_rows: int, width: int) -> np.ndarray:
    """`[R, M]` page numbers, each request's in its row; zero where a row has none."""
    table = np.zeros((num_rows, width), np.int32)
    _fill_table(table, requests, rows)
    return table


def _fill_table(table: np.ndarray, requests: Iterable[Request], rows: Iterable[int]) -> None:
    for row, request in zip(rows, requests, strict=True):
        table[row, : len(request.pages)] = request.pages


def row_batch(chunks: Sequence[Chunk], rows: Sequence[int], num_rows: int, shapes: RunnerShapes) -> RowBatch:
    """The sampling rows of a plan, each chunk in its row."""
    requests = [chunk.request for chunk in chunks]
    greedy = shapes.separate_greedy and all(r.params.plain_greedy and r.constraint is None for r in requests)
    stop_ids = np.full((num_rows, MAX_STOP_IDS), -1, np.int32)
    for row, request in zip(rows, requests, strict=True):
        ids = sorted(request.stop_ids)[:MAX_STOP_IDS]
        stop_ids[row, : len(ids)] = ids
    return RowBatch(
        slot=_at(rows, [request.slot for request in requests], num_rows, fill=shapes.spare_slot),
        limit=_at(rows, [request.limit for request in requests], num_rows),
        stop_ids=stop_ids,
        sampling=None if greedy else sampling_rows(requests, rows, num_rows, shapes.vocab_size),
    )


def sampling_rows(requests: Sequence[Request], rows: Sequence[int], num_rows: int, vocab_size: int) -> SamplingRows:
    """The requests' sampling parameters as arrays; padding rows are greedy."""
    params = [request.params for request in requests]
    bias_ids = np.full((num_rows, MAX_LOGIT_BIAS), vocab_size, np.int32)
    bias_values = np.zeros((num_rows, MAX_LOGIT_BIAS), np.float32)
    for row, p in zip(rows, params, strict=True):
        if p.logit_bias:
            bias_ids[row, : len(p.logit_bias)] = list(p.logit_bias)
            bias_values[row, : len(p.logit_bias)] = list(p.logit_bias.values())

    def floats(name: str, fill: float) -> np.ndarray:
        return _at(rows, [getattr(p, name) for p in params], num_rows, fill, np.float32)

    return SamplingRows(
        temperature=floats("temperature", 0.0),
        top_p=floats("top_p", 1.0),
        min_p=floats("min_p", 0.0),
        presence=floats("presence_penalty", 0.0),
        frequency=floats("frequency_penalty", 0.0),
        repetition=floats("repetition_penalty", 1.0),
        top_k=_at(rows, [min(p.top_k, vocab_size) for p in params], num_rows),
        seed=_seeds(requests, rows, num_rows),
        prompt_len=_at(rows, [request.num_prompt for request in requests], num_rows),
        min_len=_at(rows, [min(r.num_prompt + r.params.min_tokens, r.limit) for r in requests], num_rows),
        num_logprobs=_at(rows, [-1 if p.logprobs is None else p.logprobs for p in params], num_rows, -1),
        bias_ids=bias_ids,
        bias_values=bias_values,
        masked=_at(rows, [request.constraint is not None for request in requests], num_rows, False, np.bool_),
        allowed=None,
    )


def _seeds(requests: Sequence[Request], rows: Sequence[int], num_rows: int) -> np.ndarray:
    """Upper and lower half of each seed modulo 2^64."""
    seeds = np.zeros((num_rows, 2), np.uint32)
    for row, request in zip(rows, requests, strict=True):
        seeds[row] = request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF
    return seeds


def _pad(values: Sequence[int], size: int, fill: int = 0) -> np.ndarray:
    return np.array([*values, *[fill] * (size - len(values))], np.int32)


def _at(rows: Sequence[int], values: Sequence[float], size: int, fill: float = 0, dtype: type = np.int32) -> np.ndarray:
    out = np.full(size, fill, dtype)
    out[rows] = values
    return out
