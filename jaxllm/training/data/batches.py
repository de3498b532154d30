"""Batches in an order that depends on seed and number alone: who resumes at a step gets what that step would have got.

Either spans of one long stream of tokens (pretraining), or documents packed into spans (everything else). All arrays
are NumPy's; batches have one static shape.

Dimension letters: B spans in a batch, S tokens of a span, T = B * S.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol, final

import numpy as np

from jaxllm.training.batch import TokenBatch
from jaxllm.training.data.documents import Document

_OPEN = 16  # spans that still take documents while packing: more fill better, fewer keep the order


class Batches(Protocol):
    """What a run reads: epochs of batches `[T]`."""

    def num_batches(self, epoch: int) -> int:
        """In one pass; may differ a little between passes."""
        ...

    def batch(self, epoch: int, index: int) -> TokenBatch:
        """One batch of a pass."""
        ...

    def held_out(self) -> Iterator[TokenBatch]:
        """Every batch once, in the data's own order: for evaluation."""
        ...


def locate(batches: Batches, number: int) -> tuple[int, int]:
    """Pass and index of the batch that is `number`th from the beginning."""
    epoch = 0
    while number >= (count := batches.num_batches(epoch)):
        number -= count
        epoch += 1
    return epoch, number


@final
class Stream:
    """Spans of one stream of tokens; each predicts the token after it.

    Args:
        tokens: all ids, an array or a mapped file.
        ends: where documents end in it, ascending; empty where it is all one text.
        spans, span: of a batch, and their tokens.
    """

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, *, spans: int, span: int, seed: int):
        self._tokens, self._ends, self._spans, self._span, self._seed = tokens, ends, spans, span, seed
        self._order = functools.lru_cache(2)(self._make_order)

    def num_batches(self, epoch: int) -> int:
        """See `Batches`: what does not fill a batch is left for another pass, whose spans begin elsewhere."""
        return max(1, len(self._order(epoch)) // self._spans)

    def _make_order(self, epoch: int) -> np.ndarray:
        """Starts of the spans: cut from another first token in each pass, in another order."""
        rng = np.random.default_rng((self._seed, epoch))
        room = len(self._tokens) - 1 - self._span
        shift = int(rng.integers(0, min(self._span, room + 1)))
        return rng.permutation(np.arange(shift, room + 1, self._span))

    def batch(self, epoch: int, index: int) -> TokenBatch:
        """See `Batches`."""
        order = self._order(epoch)
        return self._at(order[np.arange(index * self._spans, (index + 1) * self._spans) % len(order)])

    def held_out(self) -> Iterator[TokenBatch]:
        """See `Batches`; spans beyond the last are there for the shape and count nothing."""
        starts = np.arange(0, len(self._tokens) - self._span, self._span)
        for first in range(0, len(starts), self._spans):
            chosen = starts[first : first + self._spans]
            batch = self._at(np.resize(chosen, self._spans))
            batch.weights[len(chosen) * self._span :] = 0.0
            yield batch

    def _at(self, starts: np.ndarray) -> TokenBatch:
        where = starts[:, None] + np.arange(self._span + 1)
        ids = self._tokens[where].astype(np.int32)
        weights = np.ones((self._spans, self._span), np.float32)
        positions = np.tile(np.arange(self._span, dtype=np.int32), self._spans)
        documents = None
        if len(self._ends):
            number = np.searchsorted(self._ends, where, side="right")
            weights[number[:, 1:] != number[:, :-1]] = 0.0
            number = number[:, :-1]
            begins = np.concatenate([[0], self._ends])[number]
            positions = (where[:, :-1] - np.maximum(begins, starts[:, None])).astype(np.int32).ravel()
            documents = (number - number[:, :1]).astype(np.int32).ravel()
        return TokenBatch(ids[:, :-1].ravel(), ids[:, 1:].ravel(), weights.ravel(), positions, documents)


@final
class Packed:
    """Documents end to end in spans, none cut, each seeing itself only."""

    def __init__(self, documents: Sequence[Document], *, spans: int, span: int, seed: int):
        for document in documents:
            if len(document.tokens) > span:
                raise ValueError(
                    f"{document.place}: has {len(document.tokens)} tokens, more than context_length={span}; raise it "
                    "or shorten the document"
                )
        self._documents, self._spans, self._span, self._seed = documents, spans, span, seed
        self._rows = functools.lru_cache(2)(self._pack)

    def num_batches(self, epoch: int) -> int:
        """See `Batches`."""
        return -(-len(self._rows(epoch)) // self._spans)

    def _pack(self, epoch: int | None) -> list[list[int]]:
        """Documents of each span: the first open span with room takes the next one."""
        order = range(len(self._documents))
        if epoch is not None:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._documents))
        closed: list[list[int]] = []
        rows: list[list[int]] = []
        room: list[int] = []
        for i in map(int, order):
            size = len(self._documents[i].tokens)
            place = next((r for r, left in enumerate(room) if left >= size), None)
            if place is None:
                if len(rows) == _OPEN:
                    fullest = int(np.argmin(room))
                    closed.append(rows.pop(fullest))
                    room.pop(fullest)
                rows.append([])
                room.append(self._span)
                place = len(rows) - 1
            rows[place].append(i)
            room[place] -= size
        return closed + rows

    def batch(self, epoch: int, index: int) -> TokenBatch:
        """See `Batches`."""
        return self._of(self._rows(epoch)[index * self._spans : (index + 1) * self._spans])

    def held_out(self) -> Iterator[TokenBatch]:
        """See `Batches`."""
        rows = self._pack(None)
        for first in range(0, len(rows), self._spans):
            yield self._of(rows[first : first + self._spans])

    def _of(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        shape = (self._spans, self._span)
        tokens, targets, positions = (np.zeros(shape, np.int32) for _ in range(3))
        documents, weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for r, row in enumerate(rows):
            begin = 0
            for number, i in enumerate(row):
                document = self._documents[i]
                box = (r, slice(begin, begin + len(document.tokens)))
                tokens[box], targets[box], weights[box] = document.tokens, document.targets, document.weights
                positions[box], documents[box] = np.arange(len(document.tokens)), number
                begin += len(document.tokens)
        return TokenBatch(*(a.ravel() for a in (tokens, targets, weights, positions, documents)))
