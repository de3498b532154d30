"""What a scheduler decides: an iteration, and each request's share of it. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxllm.scheduling.guesses import Guess
from jaxllm.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's share of an iteration: tokens `[start, start + count)` go through the model.

    `num_samples` is how many tokens it samples: 0 in mid-prompt, 1 at the end of its known tokens, up to the
    plan's number of steps in a decode loop. Every step of a loop but the first computes a token sampled by the
    step before; `count` is 1 there. With `num_drafts` each step may sample up to as many tokens more: `num_samples` is
    the most that can come, `num_unsure` of it only if drafts are right, and `start` the furthest that the device can
    have got. `guess`: the drafts themselves, where the host makes them.
    """

    request: Request
    start: int
    count: int
    num_samples: int
    num_drafts: int = 0
    num_unsure: int = 0
    guess: Guess | None = None


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """What the device does next: one ragged step, or (`is_decode_loop`) `num_steps` decode iterations.

    Chunks of one token come first; `admitted` lists requests that are new to their slot, or whose tokens there
    changed. `copies` are (from, to) pages to copy before anything is written,
    numbered over all replicas; `loads` are (slot, adapter) to write into the adapters' slots.
    """

    chunks: list[Chunk]
    admitted: list[Request] = field(default_factory=list)
    is_decode_loop: bool = False
    num_steps: int = 1
    copies: list[tuple[int, int]] = field(default_factory=list)
    loads: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that one iteration of this plan processes."""
        return sum(chunk.count for chunk in self.chunks)

    @property
    def most_tokens(self) -> int:
        """Tokens that the busiest replica processes in one iteration: what the size of the program follows."""
        counts: dict[int, int] = {}
        for chunk in self.chunks:
            replica = chunk.request.replica
            counts[replica] = counts.get(replica, 0) + chunk.count
        return max(counts.values(), default=0)


def granted(request: Request, steps: int) -> int:
    """Tokens this request may sample in a loop of `steps` iterations, where it is as long as it can be."""
    return steps if request.num_unsure else min(steps, request.limit - request.num_tokens)


def reach(request: Request, steps: int) -> int:
    """Tokens of a decoding request that are computed after a loop of `steps` iterations."""
    return min(request.held.num_computed + steps, request.limit - 1)
