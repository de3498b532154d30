"""The scheduler: before every iteration, decides which requests take part with how many tokens.

Requests and a page pool -> one `IterationPlan` at a time. ORCA's iteration-level scheduling (Yu et al. 2022) with
chunked prefill under a token budget (Sarathi-Serve, Agrawal et al. 2024). Plain Python: it knows nothing of
arrays, devices or text. It may run ahead of the device: a plan can be made while the tokens of the one before
are still unread.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxllm.scheduling.adapter_slots import AdapterSlots
from jaxllm.scheduling.guesses import Guess
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.page_lists import PageLists, utilization
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.plan import Chunk, IterationPlan, granted, reach
from jaxllm.scheduling.request import Held, Request, Status
from jaxllm.scheduling.tiers import Load, Tiers

Ranked = tuple[tuple[int, int], Request]


class Scheduler:
    """First come, first served by priority, under a token budget, a request limit and a page pool.

    `max_decode_steps=0`: no decode loops, every plan is a ragged step. `chunked_prefill=False`: a prompt waits for an
    iteration that has room for all of it. `num_drafts`: tokens that each step of a loop may draft and verify per
    request, at most; `max_drafting_rows`: rows of a loop beyond which none drafts. `guess`: up to so many drafts for a
    request with a grammar; default: none. `pace`: bounds chunks beside decodes that somebody reads along.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_decode_steps: int = 1,
        first_slot: int = 0,
        first_page: int = 0,
        tiers: Tiers | None = None,
        chunked_prefill: bool = True,
        num_drafts: int = 0,
        max_drafting_rows: int | None = None,
        guess: Callable[[Request, int], Guess] | None = None,
        adapter_slots: AdapterSlots | None = None,
        pace: Pace | None = None,
    ):
        self.pool = pool
        self.tiers = tiers
        self.adapter_slots = adapter_slots or AdapterSlots(0)
        self.page_lists = PageLists(pool, tiers, first_page)
        self.pace = pace
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_decode_steps = max_decode_steps
        self.chunked_prefill = chunked_prefill
        self.num_drafts = num_drafts if max_decode_steps else 0
        self.max_drafting_rows = max_num_seqs if max_drafting_rows is None else max_drafting_rows
        self._guess = guess
        self.running: list[Request] = []  # by rank: the first is the last to be preempted
        self._waiting: tuple[list[Ranked], list[Ranked]] = ([], [])  # heaps by rank: short prompts, long prompts
        self._slots = range(first_slot + max_num_seqs - 1, first_slot - 1, -1)
        self._free_slots = list(self._slots)
        self.num_waiting = 0  # the heaps may hold finished requests beside these
        self._blocked: list[Request] = []  # wait for a caller or another's prompt or load; they hold up nobody
        self._unsent: list[Request] = []  # running, but the device does not know their tokens yet
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.running or self.num_waiting)

    @property
    def num_copies(self) -> int:
        """Pages copied because one of several owners wrote."""
        return self.page_lists.num_copies

    @property
    def slot_utilization(self) -> float:
        """See `utilization`."""
        return utilization(list(self.running), self.pool.page_size)

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it could not finish even alone."""
        self.check_fits(request.limit)
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.parent is None:
            self._wait(request)
        else:
            self._blocked.append(request)
            self.num_waiting += 1

    def check_fits(self, limit: int) -> None:
        """Raise ValueError if a request of `limit` tokens could not finish even alone."""
        needed = self.pool.pages_for(limit)
        if needed > self.pool.num_usable:
            raise ValueError(
                f"the request may grow to {limit} tokens = {needed} pages but the cache has "
                f"{self.pool.num_usable}; lower max_tokens or raise kv_cache_memory_bytes"
            )

    def _wait(self, request: Request) -> None:
        self._queue(request)
        self.num_waiting += 1

    def _queue(self, request: Request) -> None:
        left = request.num_tokens
        if request.held.swapped is not None:
            left -= request.held.swapped.num_tokens
        elif request.parent is not None and request.parent.prompt_is_computed:
            left = 1
        heapq.heappush(self._waiting[self._is_long(left)], (request.rank, request))

    def schedule(self, steps: int | None = None) -> IterationPlan | None:
        """Plan the next iteration, or None when nothing can run before results in flight are read.

        `steps`: of a decode loop, where the caller knows that nothing comes in between; default: `loop_steps`.
        """
        plan = self.plan(self.loop_steps() if steps is None else steps)
        return plan if plan is None else replace(plan, chunks=self.with_drafts(plan, len(plan.chunks)))

    def plan(self, steps: int, *, decodes: bool = True) -> IterationPlan | None:
        """A decode loop of `steps` iterations (no more than `loop_steps` allows), or else one iteration.

        Without `decodes` those that decode sit it out.
        """
        self._begin_plan()
        if steps:
            return self._plan(self._decode_chunks(steps), [], is_decode_loop=True, num_steps=steps)
        chunks = self._decode_chunks(1) if decodes else []
        admitted = self._prefill(chunks, self._budget(chunks) - len(chunks))
        if not chunks:
            self._make_way()
            return None
        chunks.sort(key=lambda chunk: chunk.count > 1)  # stable: single queries first
        only_decodes = (
            self.max_decode_steps > 0 and not admitted and all(c.count == 1 and c.num_samples == 1 for c in chunks)
        )
        return self._plan(chunks, admitted, is_decode_loop=only_decodes)

    def _plan(self, chunks: list[Chunk], admitted: list[Request], **kwargs: Any) -> IterationPlan:
        changed, self._unsent = [r for r in self._unsent if r.status is Status.RUNNING], []
        copies, loads = self.page_lists.take_copies(), self.adapter_slots.take_loads()
        return IterationPlan(chunks, changed + admitted, copies=copies, loads=loads, **kwargs)

    def _make_way(self) -> None:
        """Nothing can run: requests on hold may stand in the way of those that their caller is waiting for."""
        on_hold = [r for r in self.running if r.on_hold]
        if on_hold and self.num_waiting and not any(r.num_pending or r.held.load for r in self.running):
            self._preempt(on_hold[-1])

    # Rule 0: what no query to come can see is given up, and whoever no longer waits for somebody else is queued.

    def _begin_plan(self) -> None:
        self.adapter_slots.begin_plan()
        for request in self.running:
            self.page_lists.begin_plan(request)
        blocked, self._blocked = self._blocked, []
        for request in blocked:
            if request.finished:
                continue
            if self._is_blocked(request):
                self._blocked.append(request)
            else:
                self._queue(request)

    def _is_blocked(self, request: Request) -> bool:
        """Whether it waits for its caller, or for another's prompt that is being computed or loaded."""
        if request.on_hold:
            return True
        parent = request.parent
        if parent is not None and not parent.finished and not parent.prompt_is_computed:
            return True
        return self.page_lists.is_loading_for(request)

    # Rule 1: every running decode takes one token per iteration.

    def loop_steps(self) -> int:
        """Iterations that may run without looking up; 0: not more than one.

        As many as `max_decode_steps`, the longest request left and the pages allow. But one at a time while a running
        request is streamed, whose tokens would come in bursts; and while anybody waits, unless all slots are taken and
        none can fall free before the loop ends.
        """
        active = [r for r in self.running if not r.exhausted]
        if not active or any(r.num_left != 1 or r.one_at_a_time or r.streamed for r in active):
            return 0
        left = [r.limit - r.num_tokens for r in active]
        steps = min(self.max_decode_steps, max(left))
        if self.num_waiting:
            if self._free_slots or len(active) < len(self.running) or any(r.may_stop for r in active):
                return 0
            num_drafts = self.num_drafts if len(active) <= self.max_drafting_rows else 0
            steps = min(steps, *(tokens // (1 + num_drafts) for tokens in left))
        growth = sum(self.page_lists.missing(r, reach(r, steps)) for r in active)
        return steps if steps > 1 and growth <= self.pool.num_free else 0

    def _decode_chunks(self, steps: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for request in list(self.running):
            if request.status is not Status.RUNNING or request.num_left != 1 or request.exhausted or request.must_wait:
                continue
            if self._make_room(request, reach(request, steps), chunks):
                chunks.append(self._take(request, 1, granted(request, steps)))
        return chunks

    def with_drafts(self, plan: IterationPlan, num_rows: int) -> list[Chunk]:
        """A plan's chunks; in a decode loop rows may draft, where there are pages that nobody else needs now.

        `num_rows`: of the loop; where each replica has its own, those of the replica that has most.
        """
        if not plan.is_decode_loop or not self.num_drafts or num_rows > self.max_drafting_rows:
            return plan.chunks
        return [self._with_drafts(chunk, plan.num_steps) for chunk in plan.chunks]

    def _with_drafts(self, chunk: Chunk, steps: int) -> Chunk:
        request = chunk.request
        asked, guess = request.params.num_speculative_tokens, None
        most = self.num_drafts if asked is None else min(asked, self.num_drafts)
        if request.one_at_a_time:
            guess = self._guess(request, most) if self._guess and most and not request.stepwise else Guess()
            most = len(guess.tokens)
        extra = (1 + most) * steps - chunk.num_samples
        end = min(request.num_tokens + extra, request.limit) - 1
        spare = self.pool.num_free - len(self.running)
        if not most or self.page_lists.missing(request, end) > max(0, spare):
            return chunk
        grown = self.page_lists.grow(request, end)
        assert grown, "there were pages enough"
        request.held.num_computed = end
        request.num_pending += extra
        request.num_unsure += extra
        return replace(chunk, num_samples=chunk.num_samples + extra, num_drafts=most, num_unsure=extra, guess=guess)

    # Rule 2: running prefills, then waiting requests, take what the decodes leave of the budget.
    #
    # What has more than half a budget left to prefill is long. One long prefill runs at a time and leaves half to short
    # prompts, if there are any: their first token waits for an iteration, not for all of somebody's prompt.

    def _prefill(self, chunks: list[Chunk], budget: int) -> list[Request]:
        running = [r for r in self.running if r.num_left > 1 and not r.on_hold]
        long = next((r for r in running if self._is_long(r.num_left)), None)
        kept = min(long.num_left, budget - budget // 2) if long else 0
        for request in running:
            if request is not long:
                budget -= self._continue(request, chunks, budget - kept)
        admitted = self._admit(chunks, budget - kept, long)
        budget -= sum(chunk.count for chunk in chunks[-len(admitted) :] if admitted)
        if long:
            budget -= self._continue(long, chunks, budget)
            if not self._is_long(long.num_left):
                admitted += self._admit(chunks, budget, None)
        return admitted

    def _budget(self, decodes: Sequence[Chunk]) -> int:
        if self.pace is None or not any(chunk.request.streamed for chunk in decodes):
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, self.pace.most(len(decodes)))

    def _is_long(self, num_tokens: int) -> bool:
        return num_tokens > self.max_num_batched_tokens // 2

    def _continue(self, request: Request, chunks: list[Chunk], budget: int) -> int:
        """Give a request up to `budget` tokens of the iteration; returns how many."""
        count = min(request.num_left, budget)
        if count > 0:
            chunks.append(self._take(request, count, int(count == request.num_left)))
        return max(0, count)

    def _admit(self, chunks: list[Chunk], budget: int, long: Request | None) -> list[Request]:
        """Admit waiting requests while slots, pages and the budget allow.

        In order of rank, except that short prompts pass those that wait for the `long` prefill under way. Whoever
        is first of all gets the slot and pages when it ends, so nobody is passed for ever.
        """
        admitted: list[Request] = []
        while budget > 0 and self._free_slots and (queue := self._next_queue(long)):
            request = queue[0][1]
            if self._is_blocked(request) or not self.adapter_slots.has_room(request.adapter):
                self._blocked.append(heapq.heappop(queue)[1])
                continue
            is_whole = self.chunked_prefill or request.num_tokens <= budget
            if request.num_pending or not is_whole or not self._start(request):
                break
            heapq.heappop(queue)
            self.num_waiting -= 1
            if request.held.load is not None:
                continue  # it has its slot and its pages; what is in them is on its way
            admitted.append(request)
            budget -= self._continue(request, chunks, budget)
        return admitted

    def _next_queue(self, long: Request | None) -> list[Ranked] | None:
        """The queue whose head is next; beside a long prefill only short prompts of its priority or a better one."""
        for queue in self._waiting:
            while queue and queue[0][1].finished:
                heapq.heappop(queue)
        queues = [queue for queue in self._waiting if queue]
        if long is not None:
            short = self._waiting[0]
            return short if short and short[0][1].priority <= long.priority else None
        return min(queues, key=lambda queue: queue[0][0], default=None)

    def _start(self, request: Request) -> bool:
        """Give a waiting request a slot and pages for all it has, reusing cached prefixes.

        Some pages are left for the decodes that run already, so that it does not push one out at once.
        """
        if not self.page_lists.reserve(request, spare=len(self.running)):
            return False
        self._run(request)
        return True

    def _run(self, request: Request) -> None:
        request.held.slot = self._free_slots.pop()
        request.held.adapter_slot = self.adapter_slots.hold(request.adapter)
        request.status = Status.RUNNING
        self.running.append(request)
        self.running.sort(key=lambda r: r.rank)

    def loaded(self, load: Load, arrived: Sequence[bool]) -> None:
        """The device has what a load brought (or it has not: then its request starts again from what is here)."""
        if load.ended:
            return
        request: Request = load.owner
        if self.page_lists.loaded(load, arrived):
            self._unsent.append(request)
        else:
            self._release(request)
            request.status = Status.WAITING
            self._wait(request)

    # What callers do to requests that wait for them (see `Engine.extend`): nothing of these is in flight.

    def fork(self, parent: Request, child: Request) -> None:
        """Start `child`, whose tokens are the parent's, on its pages; queue it where there is no slot."""
        if parent.status is not Status.RUNNING or parent.held.load is not None or not self._free_slots:
            self._wait(child)
            return
        self.page_lists.share(parent, child)
        self._run(child)
        self._unsent.append(child)

    def extend(self, request: Request, tokens: Sequence[int]) -> None:
        """Append tokens and let the request go on; its last token is computed (again) in any case."""
        assert not request.num_pending, "a token is being sampled after those that are known"
        request.token_ids += tokens
        request.on_hold, request.num_delivered = False, len(request.token_ids)
        if request.status is not Status.RUNNING or request.held.load is not None:
            return
        request.held.num_computed = min(request.held.num_computed, request.num_tokens - 1)
        if request.num_left > 1 and not self.page_lists.grow(request, request.num_tokens):
            self._preempt(request)
        elif request not in self._unsent:
            self._unsent.append(request)

    def truncate(self, request: Request, length: int) -> None:
        """Drop the tokens from `length` on."""
        assert not request.num_pending, "a token is being sampled after those to drop"
        del request.token_ids[length:]
        request.on_hold, request.num_delivered = True, min(request.num_delivered, length)
        del request.page_hashes[length // self.pool.page_size :]
        swapped = request.held.swapped
        if request.status is not Status.RUNNING:
            if swapped is not None and swapped.num_tokens > length:
                self.page_lists.forget(request)
        elif request.held.load is not None or not self.page_lists.truncate(request, length):
            self._release(request)
            self.page_lists.forget(request)
            request.status = Status.WAITING
            self._wait(request)

    def detach(self, request: Request) -> list[int]:
        """Let a running request go, nothing of which is in flight: its pages, the caller's until it frees them."""
        assert request.status is Status.RUNNING and not request.num_pending, "it is under way here"
        pages = self.page_lists.let_go(request)
        self._release(request)
        self.page_lists.forget(request)
        request.held, request.status, request.parent = Held(), Status.WAITING, None
        return pages

    def restart(self, requests: Sequence[Request]) -> None:
        """Start anew, after a failure, with requests of which the device has nothing; no page has any content."""
        self.running, self._waiting, self._blocked, self._unsent = [], ([], []), [], []
        self.num_waiting = 0
        self._free_slots = list(self._slots)
        self.page_lists.reset()
        self.adapter_slots.reset()
        self.pool.reset()
        for request in sorted(requests, key=lambda request: request.rank):
            self.page_lists.decline(request)
            request.held, request.num_pending, request.num_unsure = Held(), 0, 0
            request.status = Status.WAITING
            if len(request.token_ids) > request.num_delivered:
                del request.token_ids[request.num_delivered :]  # nobody has heard of them: they are sampled again
                request.on_hold = False
            del request.page_hashes[len(request.token_ids) // self.pool.page_size :]
            self._enqueue(request)

    # Bookkeeping that the rules share.

    def _take(self, request: Request, count: int, num_samples: int) -> Chunk:
        """Count tokens as computed: later plans build on it before the device is done."""
        chunk = Chunk(request, request.held.num_computed, count, num_samples)
        end = chunk.start + count
        request.held.num_computed = min(end + max(0, num_samples - 1), max(end, request.limit - 1))
        request.num_pending += num_samples
        self.page_lists.publish(request, len(request.token_ids))
        return chunk

    def _make_room(self, request: Request, num_tokens: int, chunks: Sequence[Chunk]) -> bool:
        """Get pages up to `num_tokens`, preempting lower ranks. False: this request sits this iteration out.

        Called in the order of ranks, so a victim has no chunk in this plan yet.
        """
        while not self.page_lists.grow(request, num_tokens):
            victims = [r for r in self.running if r.rank > request.rank and not r.exhausted]
            if victims:
                self._preempt(victims[-1])
            elif chunks or any(r.exhausted for r in self.running):
                return False  # somebody will finish and free pages
            else:
                self._preempt(request)
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Take everything away; it is swapped out, or recomputed (from cached pages, where they survive)."""
        self.page_lists.swap_out(request)
        self._release(request)
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.num_preemptions += 1
        self._wait(request)

    def _release(self, request: Request) -> None:
        self._free_slots.append(request.held.slot)
        self.adapter_slots.release(request.adapter)
        self.page_lists.release(request)
        self.running.remove(request)

    def append_tokens(self, request: Request, tokens: Sequence[int], num_samples: int, num_unsure: int = 0) -> None:
        """Hand over what an iteration sampled: of `num_samples` planned, these came before a stop or a wrong draft."""
        left = request.num_tokens - request.held.num_computed
        request.num_pending -= num_samples
        request.token_ids.extend(tokens)
        request.on_hold = request.stepwise
        if num_unsure:
            request.num_unsure -= num_unsure
            if request.status is Status.RUNNING:  # else it holds nothing, and none of it has been planned again
                self.page_lists.shrink(request, request.num_tokens - left)

    def finish(
        self, request: Request, reason: str, stop_reason: int | str | None = None, *, publish: bool = True
    ) -> None:
        """Drop a request at once, wherever it stands; its pages are free for the next plan.

        Without `publish` nobody shall find them, not even those published before.
        """
        if request.finished:
            return
        if request.status is Status.RUNNING:
            if publish:
                self.page_lists.publish(request, len(request.token_ids) - 1)  # the last was sampled, not computed
                if request.before_release is not None and reason != "abort":
                    request.before_release()
            else:
                self.pool.unpublish(request.held.pages)
            self._release(request)
        else:
            self.num_waiting -= 1
        self.page_lists.forget(request)
        request.parent = None
        request.status = Status.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
