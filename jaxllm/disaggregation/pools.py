"""Two engines that look like one: prompts are computed by the first, and go on in the second after their first token.

What an `Engine` is to its callers, with its request's life in two pools. One thread steps both and never waits for a
prefill while the decode pool has work. Knows pages and requests; nothing of text.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxllm.config.sampling import SamplingParams
from jaxllm.disaggregation.passage import Passage
from jaxllm.engine.engine import SAVE_SECONDS, Engine, NewTokens
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.request import Ending, Request, Status
from jaxllm.telemetry.accounting import Accounting, Totals
from jaxllm.telemetry.device_peaks import Ceilings

if TYPE_CHECKING:
    from jaxllm.runner.runner import ModelRunner

_IDLE_SECONDS = 0.0005


@dataclass(frozen=True, slots=True)
class _Queues:
    """Both schedulers' figures as one."""

    parts: tuple[Any, Any]

    def __getattr__(self, name: str) -> Any:
        first, second = (getattr(part, name) for part in self.parts)
        return first or second if isinstance(first, bool) else first + second

    @property
    def slot_utilization(self) -> float:
        """Of the decode pool."""
        return self.parts[1].slot_utilization


class _Books:
    """Both engines' accounting as one: sums of work, each pool's own rate of what it is there for."""

    def __init__(self, prefill: Accounting, decode: Accounting):
        self._prefill, self._decode = prefill, decode
        self.prefill_rate = prefill.prefill_rate

    @property
    def ceilings(self) -> Ceilings | None:
        """Of the decode pool."""
        return self._decode.ceilings

    @ceilings.setter
    def ceilings(self, ceilings: Ceilings | None) -> None:
        self._decode.ceilings = ceilings

    @property
    def totals(self) -> Totals:
        """Of both."""
        parts = [dataclasses.astuple(books.totals) for books in (self._prefill, self._decode)]
        return Totals(*map(sum, zip(*parts, strict=True)))

    def recent(self) -> dict[str, float | None]:
        """See `Accounting`."""
        return self._decode.recent() | {"prefill_tokens_per_s": self._prefill.recent()["prefill_tokens_per_s"]}


class PrefillDecode:
    """A prefill engine and a decode engine on disjoint devices.

    What is not defined here is the decode engine's: its runner, pages, books. Requests that choose their own tokens
    (beam search) stay in the decode pool from the beginning; passes that only score run in the prefill pool.
    """

    def __init__(self, prefill: Engine, decode: Engine):
        assert decode.mover is not None, "the receiver needs tiers"
        self.prefill, self.decode = prefill, decode
        self.passage = Passage(prefill, decode)
        self.transfers = self.passage.stats
        self.accounting = _Books(prefill.accounting, decode.accounting)
        self.scheduler = _Queues((prefill.scheduler, decode.scheduler))
        self._crossing: list[Request] = []  # in neither engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decode"], name)

    @property
    def scoring_engine(self) -> Engine:
        """Where passes run that sample nothing."""
        return self.prefill

    @property
    def engines(self) -> tuple[Engine, Engine]:
        """The two."""
        return self.prefill, self.decode

    @property
    def is_sound(self) -> bool:
        """See `Engine`."""
        return self.prefill.is_sound and self.decode.is_sound and not self._crossing

    @is_sound.setter
    def is_sound(self, value: bool) -> None:
        self.prefill.is_sound = self.decode.is_sound = value

    @property
    def progress(self) -> int:
        """See `Engine`."""
        return self.prefill.progress + self.decode.progress

    @property
    def num_completed(self) -> int:
        """See `Engine`."""
        return self.prefill.num_completed + self.decode.num_completed

    @property
    def num_not_finite(self) -> int:
        """See `Engine`."""
        return self.prefill.num_not_finite + self.decode.num_not_finite

    @property
    def has_work(self) -> bool:
        """See `Engine`."""
        return self.prefill.has_work or self.decode.has_work

    @property
    def unfinished(self) -> list[Request]:
        """See `Engine`."""
        return [*self.prefill.unfinished, *self.decode.unfinished]

    def warm_up(self, *, scoring: bool = False, **how: Any) -> None:
        """See `Engine`."""
        self.prefill.runner.warm_up(scoring=scoring, tiers=True, **how)
        self.decode.runner.warm_up(tiers=True, **how)

    @property
    def pace(self) -> Pace:
        """See `Engine`; of the decode pool, which computes prompts only where pages did not come."""
        return self.decode.pace

    @property
    def runners(self) -> list[ModelRunner]:
        """See `Engine`."""
        return [self.prefill.runner, self.decode.runner]

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> tuple[list[int], int]:
        """See `Engine`."""
        known, limit = self.decode.check_request(ids, params)
        self.prefill.scheduler.check_fits(len(known) + 1)
        return known, limit

    def make_request(self, *args: Any, request_id: str | None = None, **asked: Any) -> Request:
        """See `Engine`."""
        if request_id is not None and any(request_id == other.request_id for other in self.decode.unfinished):
            raise ValueError(f"request_id={request_id!r} is already in use; give every request its own")
        return self.prefill.make_request(*args, request_id=request_id, **asked)

    def add_request(self, ids: Sequence[int], params: SamplingParams, **asked: Any) -> Request:
        """See `Engine`."""
        known, limit = self.check_request(ids, params)
        request = self.make_request(known, params, limit, **asked)
        self.add(request)
        return request

    def add(self, request: Request) -> None:
        """See `Engine`."""
        if request.finished or any(request is other for other in self.unfinished):
            return
        if request.stepwise:
            self.decode.add(request)
            return
        request.stepwise = True  # after its first token it waits to be handed over
        self.prefill.add(request)

    def step(self) -> list[NewTokens]:
        """See `Engine`. Both engines; the prefill engine is waited for only where the other has nothing to do."""
        before, results = self.progress, []
        if self.prefill.has_work:
            results += self.prefill.step(wait=not self.decode.has_work and not self.passage.is_busy)
        self._hand_over()
        self.passage.pump()
        if self.decode.has_work:
            results += self.decode.step()
            self.passage.pump()
        if self.progress == before:
            time.sleep(_IDLE_SECONDS)
        return results

    def _hand_over(self) -> None:
        for request in self.prefill.unfinished:
            if not request.on_hold:
                continue
            self.passage.is_waiting(request)
            if request.status is not Status.RUNNING:
                self.prefill.extend(request, [])  # its pages are gone: it is computed again
            elif not self.passage.is_streaming(request):
                self._move(request)

    def _move(self, request: Request) -> None:
        """Nothing of the request is under way: it goes on in the decode engine, from what is computed."""
        self._crossing.append(request)
        held, size = request.held, self.prefill.pool.page_size
        num_tokens, first_token = held.num_computed, held.num_dropped * size
        self.passage.forget(request)
        for other in self.prefill.unfinished:
            if other.parent is request:
                other.parent = None  # its pages cannot be shared from here any more, but found
        pages = self.prefill.detach(request)
        request.offer = self.passage.offer(request, pages, num_tokens, first_token)
        request.stepwise = request.on_hold = False
        request.page_hashes, request.replica = [], 0
        self.decode.add(request)
        self.transfers.handed_over += 1
        self._crossing.remove(request)

    def finish(self, request: Request, ending: Ending, *, publish: bool = True) -> None:
        """See `Engine`."""
        self.passage.forget(request)
        for engine in self.engines:
            engine.finish(request, ending, publish=publish)  # whoever does not have it does nothing

    def abort(self, request_id: str) -> None:
        """See `Engine`."""
        for engine in self.engines:
            engine.abort(request_id)

    def recover(self) -> None:
        """See `Engine`. A request that was in neither engine goes on in the decode engine."""
        self.passage.reset()
        for request in self._crossing:
            request.offer = None
            if not any(request is other for other in self.unfinished):
                request.stepwise = request.on_hold = False
                request.page_hashes, request.replica = [], 0
                self.decode.add(request)
        for engine in self.engines:
            engine.recover()
        self._crossing.clear()

    def save_cache(self, seconds: float = SAVE_SECONDS) -> None:
        """See `Engine`: the decode pool's tiers; the prefill pool's follow in what time is left."""
        until = time.monotonic() + seconds
        for engine in reversed(self.engines):
            engine.save_cache(max(0.0, until - time.monotonic()))
