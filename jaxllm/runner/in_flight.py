"""An iteration that was dispatched and not yet read.

Device arrays on their way to the host -> each sampling chunk's tokens. Knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxllm.runner.sampler import IDLE, Sampled
from jaxllm.runner.speculation import Speculated
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.telemetry.drafts import LoopDrafts


@dataclass(frozen=True, slots=True)
class InFlight:
    """Work on its way: the chunks that sample, their rows, and what they sampled (hidden states where none does)."""

    plan: IterationPlan
    sampling: Sequence[Chunk]
    rows: Sequence[int]
    result: Sampled | Speculated | jax.Array
    dispatched: float

    @property
    def is_ready(self) -> bool:
        """Whether `read` need not wait."""
        return all(leaf.is_ready() for leaf in jax.tree.leaves(self.result))

    def read(self) -> list[tuple[Chunk, Sampled]]:
        """Wait, and return each sampling chunk's tokens (and logprobs) with idle steps dropped.

        It waits for iterations that sample nothing too: else all chunks of a long prompt would be on the device's queue
        at once, before whoever comes next.
        """
        if isinstance(self.result, Speculated):
            arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(self.result.sampled)]
            columns = (
                (chunk, row, arrays[0][:, row] != IDLE) for chunk, row in zip(self.sampling, self.rows, strict=True)
            )
            return [(chunk, Sampled(*(a[came, row] for a in arrays))) for chunk, row, came in columns]  # type: ignore[arg-type]
        if not isinstance(self.result, Sampled):
            jax.block_until_ready(self.result)
            return []
        arrays: list[Any] = [np.asarray(leaf) for leaf in jax.tree.leaves(self.result)]
        if not self.plan.is_decode_loop:
            arrays = [a[None] for a in arrays]
        taken = np.cumsum(arrays[0] != IDLE, axis=0).tolist()  # tokens of each row after each step
        last = len(taken) - 1  # what was planned with drafts may run without: then fewer come than could
        counts = (taken[min(c.num_samples - 1, last)][row] for c, row in zip(self.sampling, self.rows, strict=True))
        rows = zip(self.sampling, self.rows, counts, strict=True)
        # What was read is NumPy's.
        return [(chunk, Sampled(*(a[:count, row] for a in arrays))) for chunk, row, count in rows]  # type: ignore[arg-type]

    def drafts(self) -> LoopDrafts | None:
        """What became of the drafts of a loop that may have had some. Waits, as `read` does."""
        if not isinstance(self.result, Speculated):
            return None
        drafted = np.asarray(self.result.drafted)
        tokens = np.asarray(self.result.sampled.tokens).reshape(len(drafted), -1, drafted.shape[1])
        came = (tokens != IDLE).sum(axis=1)
        accepted = np.where(drafted > 0, np.maximum(came - 1, 0), 0)
        rows = zip(self.sampling, self.rows, strict=True)
        by_chunk = [(chunk, drafted[:, row].tolist(), accepted[:, row].tolist()) for chunk, row in rows]
        passes, verifying = (int((a.max(axis=1) > 0).sum()) for a in (came, drafted))
        return LoopDrafts(by_chunk, drafted.shape[1], passes, verifying)
