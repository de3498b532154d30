"""The engine: scheduler and runner in one loop. Requests in, tokens out; knows nothing of text.

The host is never waited for: iteration `t + 1` is planned and dispatched before the tokens of `t` are read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.endings import ending_of, rewound
from jaxllm.engine.errors import EngineError, NotFinite
from jaxllm.engine.prompts import check_ids, check_prompt
from jaxllm.engine.schedulers import schedulers_for
from jaxllm.runner.interface import Memory, Runner, Work
from jaxllm.runner.sampler import NOT_FINITE, Sampled
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.plan import Chunk
from jaxllm.scheduling.replicas import Scheduling, side_by_side
from jaxllm.scheduling.request import Ending, Held, Listener, Request, Status, next_arrival
from jaxllm.scheduling.tiers import Load
from jaxllm.telemetry.accounting import Accounting, IterationRecord
from jaxllm.telemetry.device_peaks import engine_cost, known_ceilings
from jaxllm.telemetry.drafts import DraftPauses, DraftPrice, DraftTotals, LoopDrafts
from jaxllm.telemetry.figures import Transfers

if TYPE_CHECKING:
    from jaxllm.kv.memory import KVMemory
    from jaxllm.runner.runner import ModelRunner

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
SAVE_SECONDS = 10.0
_PIPELINE_DEPTH = 2  # iterations on the device queue before the oldest is read


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of one request that have just been read, with logprobs where it asked for them."""

    request: Request
    tokens: list[int]
    sampled: Sampled


def _whole(method: Callable[P, T]) -> Callable[P, T]:
    """While it runs the engine is not sound; where an exception cuts it off, it stays so until `recover`.

    Plain statements instead of `finally`: an interrupt may come between any two.
    """

    @functools.wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        engine: Any = args[0]
        before, engine.is_sound = engine.is_sound, False
        result = method(*args, **kwargs)
        engine.is_sound = before
        return result

    return run


class Engine:
    """Continuous batching over one model on one mesh.

    Args:
        runner: the device side.
        eos_token_ids: tokens that end a request unless it ignores them.
        seed: from which requests without a seed of their own get one.
        memory: the KV cache that the runner runs on, with its page pools and lower tiers; default: the runner's.
        scheduling: who runs next; default: a `Scheduler` for each page pool.
        accounting: the books; default: those of the runner's model on its devices.
        pace: what the given `scheduling` asks how large chunks may be; default: a new one.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        eos_token_ids: Sequence[int] = (),
        memory: Memory | None = None,
        scheduling: Scheduling | None = None,
        accounting: Accounting | None = None,
        pace: Pace | None = None,
        seed: int = 0,
    ):
        # The loop uses what `Runner` has; whoever asks for more (scoring, a warm-up) has an engine on devices.
        self.runner = cast("ModelRunner", runner)
        self.memory = cast("KVMemory", memory or runner.memory)
        self.pace = pace or Pace(runner.shapes.token_buckets)  # whoever serves streams sets its target
        self.scheduler = scheduling or side_by_side(schedulers_for(self.memory, runner.shapes, pace=self.pace))
        self.pool = self.scheduler.pool
        self.tiers, self.mover = self.memory.tiers, self.memory.mover
        self.records: deque[IterationRecord] = deque(maxlen=4096)
        self.accounting = accounting or Accounting(
            engine_cost(self.runner.model, runner.shapes.kv_dtype), known_ceilings(self.runner.model)
        )
        self.drafts = DraftTotals(accepted_at=[0] * runner.shapes.num_drafts)
        ceilings = self.accounting.ceilings
        ridge = ceilings.ridge if ceilings else None
        self.draft_price = DraftPrice(self.accounting.model, runner.shapes.num_drafts, ridge)
        self.runner.draft_price = self.draft_price
        speculation = runner.shapes.speculation
        has_draft_model = speculation is not None and speculation.method == "draft_model"
        self.draft_pauses = self.runner.draft_pauses = DraftPauses(looking_costs=has_draft_model)
        self.eos_token_ids = tuple(eos_token_ids)
        if self.tiers is not None:
            self.tiers.prefill_rate = self.accounting.prefill_rate
        self._seed = seed
        self._counter = itertools.count()
        self._in_flight: deque[Work] = deque()
        self._requests: dict[str, Request] = {}
        self.progress = 0  # grows with every iteration dispatched or read
        self.num_completed = 0  # iterations read without an error
        self.num_not_finite = 0  # requests that ended because the model's numbers were no numbers
        self.transfers: Transfers | None = None  # what handing requests over has moved, where that is done
        self.is_sound = True  # False: something was cut off half-way; nothing but `recover` makes sense

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any work still on the device."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Iterations that are dispatched and not read."""
        return len(self._in_flight)

    @property
    def scoring_engine(self) -> Engine:
        """Where passes run that sample nothing: here."""
        return self

    def warm_up(self, *, scoring: bool = False, **how: Any) -> None:
        """Compile all programs; see `ModelRunner.warm_up`."""
        self.runner.warm_up(scoring=scoring, tiers=self.tiers is not None, **how)

    @property
    def runners(self) -> list[ModelRunner]:
        """All that have programs to compile."""
        return [self.runner]

    @property
    def unfinished(self) -> list[Request]:
        """Requests that are queued or running."""
        return list(self._requests.values())

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, parent: Request | None = None, **asked: Any
    ) -> Request:
        """Check, make and queue one prompt's request (`params.n` is the caller's business).

        Args:
            prompt_token_ids: integers of any kind.
            params: how to sample.
            parent: a request with the same prompt: this one waits until that is computed, and starts on its pages.
            **asked: see `make_request`.

        Raises:
            ValueError: in one line, what to change.
        """
        ids, limit = self.check_request(prompt_token_ids, params)
        request = self.make_request(ids, params, limit, parent=parent, **asked)
        self.add(request)
        return request

    def make_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        limit: int,
        *,
        request_id: str | None = None,
        seed: int | None = None,
        **asked: Any,
    ) -> Request:
        """A request that `check_request` accepted, not queued yet; `asked` are fields of `Request`.

        Raises ValueError where the name is in use.
        """
        self._check_name(request_id)
        number = next(self._counter)
        stops = (*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos_token_ids))
        seed = params.seed if seed is None else seed
        return Request(
            request_id=self._free_name(number) if request_id is None else request_id,
            token_ids=list(token_ids),
            params=params,
            limit=limit,
            stop_ids=frozenset(stops),
            seed=hash((self._seed, number)) if seed is None else seed,
            **asked,
        )

    def _free_name(self, number: int) -> str:
        while (name := f"request-{number}") in self._requests:
            number = next(self._counter)
        return name

    @_whole
    def change(self, function: Callable[..., T], *args: Any) -> T:
        """Call something that changes the engine; where it is cut off, the engine is not sound any more."""
        return function(*args)

    def _check_name(self, name: str | None) -> None:
        if name in self._requests:
            raise ValueError(f"request_id={name!r} is already in use; give every request its own")

    @_whole
    def add(self, request: Request) -> None:
        """Queue a request; one that is queued or has ended stays as it is. Raises ValueError for another's name."""
        if request.finished or self._requests.get(request.request_id) is request:
            return
        self._check_name(request.request_id)
        self._requests[request.request_id] = request
        self.scheduler.add(request)

    # What callers build on that choose tokens themselves: beam search, speculation, forced tokens.

    def extend(self, request: Request, tokens: Sequence[int]) -> None:
        """Append tokens to a request and let it go on: they run as one chunk, with a sample after the last.

        The request is `stepwise` and `on_hold`: nothing of it is on its way. Without tokens its last one runs again.

        Raises:
            ValueError: they exceed its limit.
        """
        if len(request.token_ids) + len(tokens) >= request.limit:
            raise ValueError(f"{len(tokens)} tokens more leave none of the request's {request.limit} to sample")
        self.change(self.scheduler.extend, request, list(tokens))

    def truncate(self, request: Request, length: int) -> None:
        """Drop a request's tokens from `length` on; it is on hold until it is extended. `length` keeps the prompt."""
        assert request.num_prompt <= length <= len(request.token_ids), (request.num_prompt, length)
        self.change(self.scheduler.truncate, request, length)

    @_whole
    def fork(self, parent: Request, listener: Listener | None = None) -> Request:
        """Another request with the tokens of `parent`, on its pages until one of them writes there; it is on hold."""
        assert parent.constraint is None, "a constraint follows one sequence"
        child = dataclasses.replace(
            parent,
            request_id=self._free_name(next(self._counter)),
            token_ids=list(parent.token_ids),
            page_hashes=[],
            held=Held(),
            num_pending=0,
            num_delivered=len(parent.token_ids),
            num_preemptions=0,
            parent=None,
            listener=listener,
            stepwise=True,
            on_hold=True,
            status=Status.WAITING,
            arrival=next_arrival(),
        )
        self._requests[child.request_id] = child
        self.scheduler.fork(parent, child)
        return child

    @_whole
    def detach(self, request: Request) -> list[int]:
        """Let a request go that another engine goes on with; it is on hold, and its listener hears nothing of it.

        Returns its pages: the caller's, until `pool` is given them back.
        """
        del self._requests[request.request_id]
        return self.scheduler.detach(request)

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> tuple[list[int], int]:
        """The prompt's token ids and the length at which such a request ends; safe on any thread.

        Raises:
            ValueError: it cannot run.
        """
        known = self.check_prompt(ids)
        check_ids(params, self.runner.model.cfg.vocab_size)
        most = self.runner.shapes.max_model_len
        limit = most if params.max_tokens is None else min(most, len(known) + params.max_tokens)
        self.scheduler.check_fits(limit)
        return known, limit

    def check_prompt(self, ids: Sequence[int]) -> list[int]:
        """These ids as plain integers. Raises ValueError where they are no prompt for this engine."""
        return check_prompt(ids, self.runner.shapes.max_model_len, self.runner.model.cfg.vocab_size)

    @_whole
    def step(self, *, wait: bool = True) -> list[NewTokens]:
        """Dispatch the next iteration, if any, and read the oldest one that is due.

        Its tokens go to the requests' listeners; what is returned is for those who have none. Without `wait` nothing is
        read that the device is not done with: for whoever steps another engine as well.
        """
        if self.mover is not None:
            self.progress += self.mover.finish(self._loaded)
        plan = self.scheduler.schedule() if len(self._in_flight) < _PIPELINE_DEPTH else None
        self.start_moves()
        if plan is not None:
            self._in_flight.append(self.runner.dispatch(plan))
            self.progress += 1
        is_due = self._in_flight and (plan is None or len(self._in_flight) >= _PIPELINE_DEPTH)
        if is_due and (wait or self._in_flight[0].is_ready):
            return self._collect(self._in_flight.popleft())
        if wait and plan is None and self.mover is not None:
            self.mover.rest()  # nothing else to do
        return []

    @_whole
    def settle(self) -> None:
        """Read all that is on its way: afterwards nothing is on the device's queue, and no page moves."""
        while self._in_flight:
            self._collect(self._in_flight.popleft())
        if self.mover is not None:
            self.mover.start()
            while self.mover.is_moving:
                self.progress += self.mover.finish(self._loaded)
                self.mover.rest()
            self.mover.wait()
        self.runner.block_until_ready()

    def _loaded(self, load: Load, arrived: Sequence[bool]) -> None:
        request: Request = load.owner
        required = request.offer.required if request.offer is not None else None
        self.scheduler.loaded(load, arrived)
        if required is not None and not all(arrived):
            self.finish(request, Ending("abort", error=required))

    def start_moves(self) -> None:
        """Send off what has to leave pages that were handed out anew; call it before anything writes there."""
        if self.mover is not None:
            self.mover.start()

    def evict_idle(self) -> None:
        """Push every cached page that nobody uses off the device, into the tiers below."""
        self.pool.evict_idle()
        self.start_moves()

    def save_cache(self, seconds: float = SAVE_SECONDS) -> None:
        """Write every cached prefix page to the disk tier, if there is one; ends whatever is unfinished.

        For the end of a process: bounded in time, and again where it was interrupted. An engine that is not sound
        saves what its host memory holds.
        """
        if self.mover is None or self.mover.disk is None:
            return
        if self.is_sound:
            for request in self.unfinished:
                self.finish(request, Ending("abort"))
        self.mover.save(seconds, self.evict_idle if self.is_sound else lambda: None)

    def _collect(self, work: Work) -> list[NewTokens]:
        results = []
        self.progress += 1
        read = work.read()
        self._record(work, read)
        for chunk, sampled in read:
            if not chunk.request.finished:  # else it ended while this iteration was in flight
                results.append(self._deliver(chunk, sampled))
        self.num_completed += 1
        return results

    def _deliver(self, chunk: Chunk, sampled: Sampled) -> NewTokens:
        """Hand a request its new tokens and end it where they do: the one place where that is decided."""
        request, tokens = chunk.request, sampled.tokens.tolist()
        is_finite = not tokens or tokens[-1] != NOT_FINITE
        if not is_finite:
            tokens.pop()
        self.scheduler.append_tokens(request, tokens, chunk.num_samples, chunk.num_unsure)
        ending = ending_of(request, tokens) if is_finite else Ending("abort", error=NotFinite())
        if request.listener is not None:
            try:
                ending = request.listener.take(request, tokens, sampled, ending)
            except Exception as error:  # costs nobody else anything
                log.error("the listener of %s failed", request.request_id, exc_info=error)
                ending = Ending("abort", error=EngineError(f"the output cannot be made: {error}"))
        if ending is None:
            request.num_delivered = len(request.token_ids)
        else:
            self.num_not_finite += isinstance(ending.error, NotFinite)
            self.finish(request, ending, publish=is_finite)
        return NewTokens(request, tokens, sampled)

    def recover(self) -> None:
        """Start anew after anything was cut off by an exception, from what is sure: requests and their known tokens.

        What is on the device, what is cached and what was decided is forgotten; every unfinished request waits again,
        and goes on where its listener stands. May be interrupted and run again.
        """
        self.is_sound = False
        self._in_flight.clear()
        for request in self.unfinished:
            if request.finished:  # cut off between its end and the news of it
                self._end(request)
        if self.tiers is not None and self.mover is not None:
            self.tiers.reset()
            self.mover.reset()
        self.scheduler.restart(self.unfinished)
        self.runner.reset()
        for request in self.unfinished:
            if not rewound(request):
                self.finish(request, Ending("abort", error=EngineError("an interrupt came at a bad moment; try again")))
        self.is_sound = True

    @_whole
    def finish(self, request: Request, ending: Ending, *, publish: bool = True) -> None:
        """End a request now, and tell its listener; tokens of it that are still on the device are dropped.

        Without `publish` its pages cannot be found as a prefix.
        """
        if self._requests.get(request.request_id) is not request:
            return
        request.error = ending.error
        self.scheduler.finish(request, ending.reason, ending.stop_reason, publish=publish)
        self._end(request)

    def _end(self, request: Request) -> None:
        try:
            if request.listener is not None:
                request.listener.end(request)
        except Exception as error:
            log.error("the listener of %s failed", request.request_id, exc_info=error)
        self._requests.pop(request.request_id, None)

    def abort(self, request_id: str) -> None:
        """End a request by name; unknown names (it may just have finished) are ignored."""
        if (request := self._requests.get(request_id)) is not None:
            self.finish(request, Ending("abort"))

    def _record(self, work: Work, read: Sequence[tuple[Chunk, Sampled]]) -> None:
        now, compilations = self.runner.now(), self.runner.num_compilations
        drafts = work.drafts()
        record = self.accounting.arrived(
            work.plan, read, dispatched=work.dispatched, now=now, num_compilations=compilations, drafts=drafts
        )
        self.records.append(record)
        if not work.plan.is_decode_loop and not record.compiled:
            self.pace.observe(work.plan.most_tokens, record.seconds)
        if drafts is not None:
            self._count_drafts(drafts, record)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", record.line())

    def _count_drafts(self, drafts: LoopDrafts, record: IterationRecord) -> None:
        self.drafts.num_iterations += drafts.num_passes
        self.drafts.num_verifying += drafts.num_verifying
        self.draft_pauses.observe(drafts)
        for chunk, drafted, accepted in drafts.by_chunk:
            self.drafts.add(drafted, accepted)
            chunk.request.num_draft_tokens += sum(drafted)
            chunk.request.num_accepted_tokens += sum(accepted)
        if not record.compiled:
            num_plain = drafts.num_passes - drafts.num_verifying
            self.draft_price.observe(drafts.num_rows, num_plain, drafts.num_verifying, record.seconds)
