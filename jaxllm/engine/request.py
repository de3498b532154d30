"""One request's state as the scheduler sees it. Plain Python: token ids in, token ids out."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from jaxllm.engine.sampling_params import SamplingParams

_arrivals = itertools.count()


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Constraint(Protocol):
    """Which tokens may come next, given those sampled so far (a grammar, say). One per request.

    Attributes:
        finished: nothing but the end may follow.
        error: why it cannot go on, or None.
    """

    finished: bool
    error: str | None

    def accept(self, token: int) -> None:
        """Take one sampled token."""
        ...

    def fill_mask(self, words: Any) -> None:
        """Write the allowed tokens as bits into int32 `words`, lowest bit first."""
        ...


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to tokens.

    `token_ids` holds what is known: the prompt and the sampled tokens that have been read back. `num_pending`
    counts sampled tokens that are still on the device, so `num_tokens` is the length the sequence has there.
    `num_computed` counts tokens whose keys and values are in the cache or will be when the iterations in flight
    end; what lies between it and `num_tokens` is the work left.

    Attributes:
        limit: length at which generation ends: prompt + max_tokens, capped by the engine's max_model_len.
        priority: smaller runs first; equal ones run in order of arrival.
        replica: which data-parallel replica it runs on; its pages are numbers of that replica's cache.
        slot: row of the device's per-request state while running, else -1.
        constraint: limits the next token by those before it, so none may be sampled ahead of reading them.
        error: why the engine ended it with `abort`, where it knows.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    limit: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    cache_salt: str = ""
    arrival: int = field(default_factory=lambda: next(_arrivals))
    arrival_time: float = field(default_factory=time.monotonic)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt: int = 0
    num_computed: int = 0
    num_pending: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    replica: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    constraint: Constraint | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence on the device."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values still have to be computed: 1 means it decodes."""
        return self.num_tokens - self.num_computed

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be scheduled: the last token it may have is already sampled."""
        return self.num_tokens >= self.limit

    @property
    def must_wait(self) -> bool:
        """Whether its next token can only be planned once the sampled ones have been read."""
        return self.constraint is not None and self.num_pending > 0

    @property
    def on_device(self) -> bool:
        """Whether the device holds anything of it that cannot be recomputed from `token_ids`."""
        return self.status is Status.RUNNING or self.num_pending > 0

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated and read back so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def finished(self) -> bool:
        """Whether it has left the scheduler."""
        return self.status is Status.FINISHED

    @property
    def rank(self) -> tuple[int, int]:
        """Scheduling order: smaller goes first."""
        return (self.priority, self.arrival)
