"""Speculation on paper: each draft is right with the same chance, and as many are verified as pay.

Which token stands in a draft is not modelled, nor that some texts are guessed better than others; what verifying costs
is, by the same times as any iteration, and what it brings: `(1 - a^(g+1)) / (1 - a)` tokens for `g` drafts on average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxllm.scheduling.plan import Chunk, IterationPlan


class PaperDrafts:
    """What becomes of drafts.

    Args:
        acceptance: the chance of one that all before it are right.
        seed: of the draws.
    """

    def __init__(self, acceptance: float, *, seed: int = 0):
        self._acceptance = acceptance
        self._random = np.random.default_rng((seed, 3))
        self._lengths: dict[str, int] = {}  # tokens of each request, those in flight included

    def expected(self, count: int) -> float:
        """Tokens of a row with so many drafts."""
        return float(np.sum(self._acceptance ** np.arange(count + 1)))

    def worth(self, most: int, seconds: Callable[[int], float]) -> int:
        """How many drafts yield the most tokens per second; `seconds` of an iteration with so many in each row."""
        return max(range(most + 1), key=lambda count: self.expected(count) / seconds(count))

    def begin(self, plan: IterationPlan) -> list[int]:
        """Tokens of each chunk's request before this plan samples."""
        admitted = {request.request_id for request in plan.admitted}
        lengths = []
        for chunk in plan.chunks:
            name, known = chunk.request.request_id, chunk.start + chunk.count
            lengths.append(known if chunk.count > 1 or name in admitted else self._lengths.get(name, known))
        return lengths

    def sampled(self, chunks: Sequence[Chunk], lengths: Sequence[int]) -> None:
        """So long are they now."""
        for chunk, length in zip(chunks, lengths, strict=True):
            self._lengths[chunk.request.request_id] = length

    def accepted(self, counts: Sequence[int]) -> list[int]:
        """How many of each row's drafts are right."""
        most = max(counts, default=0)
        right = self._random.random((len(counts), most)) < self._acceptance
        right &= np.arange(most) < np.array(counts)[:, None]
        return np.cumprod(right, axis=1).sum(axis=1).tolist()
