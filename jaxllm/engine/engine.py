"""The engine: scheduler and runner in one loop. Requests in, tokens out; knows nothing of text.

The host is never waited for: iteration `t + 1` is planned and dispatched before the tokens of `t` are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jaxllm.config.sampling import SamplingParams
from jaxllm.kv.mover import Mover
from jaxllm.runner.in_flight import InFlight
from jaxllm.runner.runner import ModelRunner
from jaxllm.runner.sampler import Sampled
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.replicas import Replicas
from jaxllm.scheduling.request import Constraint, Request, Status, next_arrival
from jaxllm.scheduling.scheduler import Chunk, Scheduler
from jaxllm.scheduling.tiers import Tiers
from jaxllm.telemetry.accounting import Accounting, IterationRecord
from jaxllm.telemetry.device_peaks import engine_cost, known_ceilings

log = logging.getLogger(__name__)
_MOVING_SECONDS = 0.0005
_PIPELINE_DEPTH = 2  # iterations on the device queue before the oldest is read


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of one request that have just been read, with logprobs where it asked for them."""

    request: Request
    tokens: list[int]
    sampled: Sampled


class Engine:
    """Continuous batching over one model on one mesh.

    Args:
        runner: the device side.
        eos_token_ids: tokens that end a request unless it ignores them.
        seed: from which requests without a seed of their own get one.
        namespace: what besides the tokens decides what is cached for them; see `PagePool`.
        tiers, mover: what is kept below the device, and who carries it there and back.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        eos_token_ids: Sequence[int] = (),
        enable_prefix_caching: bool = True,
        seed: int = 0,
        namespace: str = "",
        tiers: Tiers | None = None,
        mover: Mover | None = None,
    ):
        shapes = runner.shapes
        self.runner = runner

        def scheduler(replica: int) -> Scheduler:
            pool = PagePool(
                shapes.num_pages, shapes.page_size, enable_prefix_caching=enable_prefix_caching, namespace=namespace,
                window=runner.model.cfg.cache_window,
            )  # fmt: skip
            return Scheduler(
                pool,
                max_num_seqs=shapes.max_num_seqs,
                max_num_batched_tokens=shapes.max_num_batched_tokens,
                max_decode_steps=shapes.max_decode_steps,
                first_slot=replica * shapes.max_num_seqs,
                tiers=tiers,
            )

        assert tiers is None or shapes.num_replicas == 1, "tiers serve one replica"
        schedulers = [scheduler(replica) for replica in range(shapes.num_replicas)]
        self.scheduler = schedulers[0] if len(schedulers) == 1 else Replicas(schedulers)
        self.pool = self.scheduler.pool
        self.tiers, self.mover = tiers, mover
        self.records: deque[IterationRecord] = deque(maxlen=4096)
        self.accounting = Accounting(engine_cost(runner.model, shapes.kv_dtype), known_ceilings(runner.model))
        self.eos_token_ids = tuple(eos_token_ids)
        if tiers is not None:
            tiers.prefill_rate = self.accounting.prefill_rate
        self._seed = seed
        self._counter = itertools.count()
        self._in_flight: deque[InFlight] = deque()
        self._requests: dict[str, Request] = {}
        self.progress = 0  # grows with every iteration dispatched or read
        self.num_completed = 0  # iterations read without an error

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished or any work still on the device."""
        return self.scheduler.has_work or bool(self._in_flight)

    @property
    def unfinished(self) -> list[Request]:
        """Requests that are queued or running."""
        return list(self._requests.values())

    def add_request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None,
        priority: int = 0, cache_salt: str = "", constraint: Constraint | None = None,
        parent: Request | None = None, lockstep: bool = False, streamed: bool = False,
    ) -> Request:  # fmt: skip
        """Queue one prompt (`params.n` is the caller's business). Raises ValueError that says what to change.

        With a `parent` of the same prompt it waits until that prompt is computed, and starts on its pages. Under
        `lockstep` it stops after every token until the caller has said which one to go on with (`replace_last`). A
        `streamed` one, and whatever runs beside it, gets its tokens one by one.
        """
        number = next(self._counter)
        request_id = request_id or f"request-{number}"
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r} is already in use; give every request its own")
        limit = self.check_request(prompt_token_ids, params)
        stops = (*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos_token_ids))
        request = Request(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            params=params,
            limit=limit,
            stop_ids=frozenset(stops),
            seed=hash((self._seed, number)) if params.seed is None else params.seed,
            priority=priority,
            cache_salt=cache_salt,
            constraint=constraint,
            parent=parent,
            streamed=streamed,
            num_confirmed=len(prompt_token_ids) if lockstep else None,
        )
        self.scheduler.add(request)
        self._requests[request_id] = request
        return request

    def fork(self, parent: Request, token: int) -> Request:
        """Another request in lockstep, equal to `parent` but for its last token, on the same pages."""
        number = next(self._counter)
        child = dataclasses.replace(
            parent, request_id=f"request-{number}", token_ids=[*parent.token_ids[:-1], token], pages=[], slot=-1,
            status=Status.WAITING, page_hashes=[], num_computed=0, num_settled=0, num_published=0, num_dropped=0,
            num_preemptions=0, num_confirmed=len(parent.token_ids), load=None, swapped=None, arrival=next_arrival(),
        )  # fmt: skip
        child.num_prompt = parent.num_prompt
        self.scheduler.fork(parent, child)
        self._requests[child.request_id] = child
        return child

    def replace_last(self, request: Request, token: int) -> None:
        """Let a request in lockstep go on, with this token in place of the one it sampled."""
        self.scheduler.replace_last(request, token)

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> int:
        """The length at which such a request ends. Raises ValueError if it cannot run; safe on any thread."""
        self.check_prompt(ids, params)
        max_len = self.runner.shapes.max_model_len
        limit = max_len if params.max_tokens is None else min(max_len, len(ids) + params.max_tokens)
        self.scheduler.check_fits(limit)
        return limit

    def check_prompt(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raise ValueError where these ids are no prompt for this engine."""
        max_len, vocab = self.runner.shapes.max_model_len, self.runner.model.cfg.vocab_size
        if not len(ids):
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) >= max_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and max_model_len is {max_len}, which leaves no room for an answer; "
                "shorten the prompt or raise max_model_len"
            )
        bad = [i for i in ids if not isinstance(i, int) or not 0 <= i < vocab]
        named = (params.stop_token_ids, params.logit_bias, params.allowed_token_ids)
        bad += [i for ids in named for i in ids or () if i >= vocab]
        if bad:
            raise ValueError(f"token id {bad[0]!r} is outside the vocabulary; ids must be in 0..{vocab - 1}")

    def step(self) -> list[NewTokens]:
        """Dispatch the next iteration, if any, and read the oldest one that is due."""
        if self.mover is not None:
            self.progress += self.mover.finish(self.scheduler.loaded)
        plan = self.scheduler.schedule()
        self.start_moves()
        if plan is not None:
            self._in_flight.append(self.runner.dispatch(plan))
            self.progress += 1
        if self._in_flight and (plan is None or len(self._in_flight) >= _PIPELINE_DEPTH):
            return self._collect(self._in_flight.popleft())
        if plan is None and self.mover is not None and self.mover.is_moving:
            time.sleep(_MOVING_SECONDS)  # nothing else to do: leave the processor to what copies
        return []

    def start_moves(self) -> None:
        """Send off what has to leave pages that were handed out anew; call it before anything writes there."""
        if self.mover is not None:
            self.mover.start()

    def evict_idle(self) -> None:
        """Push every cached page that nobody uses off the device, into the tiers below."""
        self.pool.evict_idle()
        self.start_moves()

    def _collect(self, work: InFlight) -> list[NewTokens]:
        results = []
        self.progress += 1
        read = work.read()
        self._record(work, read)
        for chunk, sampled in read:
            request = chunk.request
            if request.finished:
                continue  # it ended while this iteration was in flight
            tokens = sampled.tokens.tolist()
            self.scheduler.append_tokens(request, tokens, chunk.num_samples)
            self._finish_if_done(request)
            if request.constraint is not None and not request.finished:
                self._advance(request, request.constraint, tokens)
            results.append(NewTokens(request, tokens, sampled))
        self.num_completed += 1
        return results

    def _finish_if_done(self, request: Request) -> None:
        last = request.token_ids[-1]
        if last in request.stop_ids and len(request.token_ids) > request.num_prompt:
            user_stop = last in (request.params.stop_token_ids or ())
            self.finish(request, "stop", last if user_stop else None)
        elif len(request.token_ids) >= request.limit:
            self.finish(request, "length")

    def _advance(self, request: Request, constraint: Constraint, tokens: Sequence[int]) -> None:
        for token in tokens:
            constraint.accept(token)
        if constraint.error is not None:
            request.error = constraint.error
            self.finish(request, "abort")
        elif constraint.finished:
            self.finish(request, "stop")

    def recover(self) -> list[Request]:
        """After a step that raised: end every request that has state on the device, and start that state anew.

        Waiting requests stay queued. Returns the requests that were ended.
        """
        self._in_flight.clear()
        lost = [request for request in self.unfinished if request.on_device]
        for request in lost:
            self.finish(request, "abort")
        if self.tiers is not None and self.mover is not None:
            self.tiers.reset()
            self.mover.reset()
        self.pool.reset_prefix_cache()
        self.pool.check([])
        self.runner.reset()
        return lost

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """End a request now; tokens of it that are still on the device are dropped."""
        self.scheduler.finish(request, reason, stop_reason)
        self._requests.pop(request.request_id, None)

    def abort(self, request_id: str) -> None:
        """End a request by name; unknown names (it may just have finished) are ignored."""
        if (request := self._requests.get(request_id)) is not None:
            self.finish(request, "abort")

    def _record(self, work: InFlight, read: Sequence[tuple[Chunk, Sampled]]) -> None:
        now, compilations = time.perf_counter(), self.runner.num_compilations
        record = self.accounting.arrived(
            work.plan, read, dispatched=work.dispatched, now=now, num_compilations=compilations
        )
        self.records.append(record)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("%s", record.line())
