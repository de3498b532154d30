"""One request's state as the scheduler sees it. Plain Python: token ids in, token ids out."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.tiers import Load, Swapped

_arrivals = itertools.count()


def next_arrival() -> int:
    """A place behind everybody who came before."""
    return next(_arrivals)


class Status(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Constraint(Protocol):
    """Which tokens may come next, given those sampled so far (a grammar, say). One per request.

    Attributes:
        is_fixed: the same tokens are allowed wherever it is asked, so that sampling need not wait for reading.
        finished: nothing but the end may follow.
        error: why it cannot go on, or None.
    """

    is_fixed: bool
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
        pages: where its keys and values are; 0 stands for a page that nothing to come can see.
        num_published, num_dropped: how many of its first pages were made findable; were found to be out of sight.
        num_settled: what `num_computed` was before the plan that is being made.
        parent: a request with the same prompt; once that has been computed, this one starts on its pages.
        load: pages on their way up from a lower tier; the request runs (has slot and pages) but nothing is planned.
        swapped: its cache while it is preempted, where that was kept.
        num_confirmed: tokens that may be built on, where somebody chooses each one from what was sampled (beam
            search); None: all.
        streamed: somebody reads its tokens one by one as they come.
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
    arrival: int = field(default_factory=next_arrival)
    arrival_time: float = field(default_factory=time.monotonic)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt: int = 0
    num_computed: int = 0
    num_settled: int = 0
    num_pending: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    replica: int = 0
    streamed: bool = False
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_dropped: int = 0
    constraint: Constraint | None = None
    parent: Request | None = None
    num_confirmed: int | None = None
    load: Load | None = None
    swapped: Swapped | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence on the device."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values still have to be computed: 1 means it decodes, 0 that it waits for a load."""
        return self.num_tokens - self.num_computed if self.load is None else 0

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be scheduled: the last token it may have is already sampled."""
        return self.num_tokens >= self.limit

    @property
    def may_stop(self) -> bool:
        """Whether what it samples can end it before its limit."""
        return bool(self.stop_ids or self.params.stop)

    @property
    def must_wait(self) -> bool:
        """Whether its next token can only be planned once the sampled ones have been read."""
        return self.on_hold or (self.one_at_a_time and self.num_pending > 0)

    @property
    def on_hold(self) -> bool:
        """Whether its last token is not confirmed yet."""
        return self.num_confirmed is not None and len(self.token_ids) > self.num_confirmed

    @property
    def one_at_a_time(self) -> bool:
        """Whether every token must be read before the next is sampled."""
        return (self.constraint is not None and not self.constraint.is_fixed) or self.num_confirmed is not None

    @property
    def prompt_is_computed(self) -> bool:
        """Whether plans already made hold the whole prompt, so that others may build on its pages."""
        return self.status is Status.RUNNING and self.num_settled >= self.num_prompt

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
