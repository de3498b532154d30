"""One request's state as the scheduler sees it. Plain Python: token ids in, token ids out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.adapter_slots import Adapter
from jaxllm.scheduling.tiers import Load, Offer, Swapped

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

    def forced(self) -> Sequence[int]:
        """The tokens that must come next, where there is no choice."""
        ...

    def copy(self) -> Constraint:
        """An independent one in the same state."""
        ...

    def rewind(self, tokens: Sequence[int]) -> None:
        """Go back to where exactly these tokens were accepted."""
        ...


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ends: `stop`, `length` or `abort`, with the stop token or string, or the error behind it."""

    reason: str
    stop_reason: int | str | None = None
    error: Exception | None = None


class Listener(Protocol):
    """Who hears of a request, from its first token to its end. One per request.

    Whoever steps the engine, a request's tokens go to its own listener. After a failure or an interrupt the engine
    may say things again: `rewind` first, then the tokens that follow; `end` more than once.
    """

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        """New tokens, what the sampler reported of them, and how they end the request, if they do.

        Returns how the request ends, where that is now: a listener may end it earlier (a stop string).
        """
        ...

    def end(self, request: Request) -> None:
        """The request has ended; see its `finish_reason` and `error`."""
        ...

    def rewind(self, request: Request) -> bool:
        """Forget tokens beyond the request's `output_ids`: they come again. False: it cannot go on from there."""
        ...


@dataclass(slots=True)
class Held:
    """What a request holds of the device and of the cache: made new when it starts (again), and for a fork.

    `num_computed` counts tokens whose keys and values are in the cache or will be when the iterations in flight end.

    Attributes:
        slot: row of the device's per-request state while running, else -1.
        adapter_slot: where its adapter lies on the device; 0: it has none.
        pages: where its keys and values are; 0 stands for a page that nothing to come can see.
        num_planned: what `num_computed` was before the plan that is being made.
        num_published, num_dropped: how many of its first pages were made findable; were found to be out of sight.
        load: pages on their way up from a lower tier; the request runs (has slot and pages) but nothing is planned.
        swapped: its cache while it is preempted, where that was kept.
    """

    slot: int = -1
    adapter_slot: int = 0
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_planned: int = 0
    num_published: int = 0
    num_dropped: int = 0
    load: Load | None = None
    swapped: Swapped | None = None


def page_salt(cache_salt: str, adapter: Adapter | None) -> str:
    """What besides its tokens decides a request's keys and values; no `cache_salt` of a user begins so."""
    return cache_salt if adapter is None else f"\0{adapter.identity} {cache_salt}"


@dataclass(slots=True, eq=False)
class Request:
    """A prompt on its way to tokens: what was asked, the tokens, what it holds of the cache, and how it ended.

    `token_ids` holds what is known: the prompt and the sampled tokens that have been read back. `num_pending`
    counts sampled tokens that are still on the device, so `num_tokens` is the length the sequence has there: where
    tokens were drafted, the most that it can have. What lies between `held.num_computed` and it is the work left.

    Attributes:
        num_unsure: of the pending tokens, those that come only if drafts are right.
        limit: length at which generation ends: prompt + max_tokens, capped by the engine's max_model_len.
        priority: smaller runs first; equal ones run in order of arrival.
        streamed: somebody reads its tokens one by one as they come.
        adapter: what is added to the model for it; part of what its pages are found by.
        constraint: limits the next token by those before it, so none may be sampled ahead of reading them.
        listener: who hears of its tokens and its end.
        stepwise: after every token it samples it is `on_hold` until its caller extends it (`Engine.extend`).
        num_delivered: length up to which its listener has the tokens.
        page_hashes: of its full pages, as far as known: a function of the tokens.
        num_cached: prompt tokens that were found in a cache when it first ran.
        num_draft_tokens, num_accepted_tokens: drafted for it and verified so far; of these, right.
        replica: which data-parallel replica it runs on; its pages are numbers of that replica's cache.
        parent: a request with the same prompt; once that has been computed, this one starts on its pages.
        before_release: called when it ends with a result, while it still has its pages.
        offer: what another engine has computed of it, until that is here, failed, or not wanted any more.
        error: why it ended with `abort`, where somebody should know.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    limit: int
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    priority: int = 0
    cache_salt: str = ""
    adapter: Adapter | None = None
    streamed: bool = False
    constraint: Constraint | None = None
    listener: Listener | None = None
    arrival: int = field(default_factory=next_arrival)

    num_prompt: int = 0
    num_pending: int = 0
    num_unsure: int = 0
    stepwise: bool = False
    on_hold: bool = False
    num_delivered: int = 0
    page_hashes: list[bytes] = field(default_factory=list)

    held: Held = field(default_factory=Held)
    num_cached: int | None = None
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    replica: int = 0
    parent: Request | None = None
    offer: Offer | None = None
    before_release: Callable[[], None] | None = None

    status: Status = Status.WAITING
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prompt or len(self.token_ids)
        self.num_delivered = self.num_delivered or self.num_prompt

    @property
    def slot(self) -> int:
        """See `Held`."""
        return self.held.slot

    @property
    def pages(self) -> list[int]:
        """See `Held`."""
        return self.held.pages

    @property
    def page_salt(self) -> str:
        """See the function of that name."""
        return page_salt(self.cache_salt, self.adapter)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence on the device, at most."""
        known = len(self.token_ids)  # asked for several times per token: no calls that can be spared
        total, most = known + self.num_pending, self.limit
        return total if total <= most else max(known, most)

    @property
    def num_left(self) -> int:
        """Tokens whose keys and values still have to be computed: 1 means it decodes, 0 that it waits for a load."""
        return self.num_tokens - self.held.num_computed if self.held.load is None else 0

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
    def one_at_a_time(self) -> bool:
        """Whether every token must be read before the next is sampled."""
        return (self.constraint is not None and not self.constraint.is_fixed) or self.stepwise

    @property
    def prompt_is_computed(self) -> bool:
        """Whether plans already made hold the whole prompt, so that others may build on its pages."""
        return self.status is Status.RUNNING and self.held.num_planned >= self.num_prompt

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
