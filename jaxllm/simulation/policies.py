"""Ways to batch that came before, for comparison: each is the engine's own scheduler with one thing taken away.

static         request-level batching: a batch runs to its longest end before the next begins (before ORCA)
prefill-first  whole prompts before any decode (vLLM's first scheduler)
unchunked      prompts whole, beside the decodes (ORCA's mixed batches)
contiguous     room for the longest possible sequence is set aside for each request (before PagedAttention)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from jaxllm.runner.shapes import RunnerShapes
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.scheduling.replicas import Scheduling
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.simulation.disaggregated import HandOverGate
from jaxllm.simulation.paper_engine import Policy


class BatchGate:
    """Requests enter `size` at a time, and only when nobody is left of those before.

    Args:
        size: requests of a batch.
    """

    def __init__(self, size: int):
        self._size = size
        self._held: deque[Request] = deque()
        self._batch: list[Request] = []

    def hold(self, request: Request) -> None:
        """See `Gate`."""
        self._held.append(request)

    def release(self, scheduler: Scheduling) -> Sequence[Request]:
        """See `Gate`."""
        if scheduler.has_work:
            return ()
        self._batch = [self._held.popleft() for _ in range(min(self._size, len(self._held)))]
        return self._batch

    def finished(self, request: Request) -> None:
        """See `Gate`."""
        if all(other.finished for other in self._batch):
            for other in self._batch:
                if other.listener is not None:
                    other.listener.end(other)  # again: the answer leaves with the batch

    def __len__(self) -> int:
        return len(self._held)


class ReservingGate:
    """A request enters when a contiguous run of `reserve(request)` tokens is free; fragments are not modelled."""

    def __init__(self, capacity: int, reserve: Callable[[Request], int]):
        self._free, self._reserve = capacity, reserve
        self._held: deque[Request] = deque()

    def hold(self, request: Request) -> None:
        """See `Gate`."""
        self._held.append(request)

    def release(self, scheduler: Scheduling) -> Sequence[Request]:
        """See `Gate`."""
        released: list[Request] = []
        while self._held and self._reserve(self._held[0]) <= self._free:
            request = self._held.popleft()
            self._free -= self._reserve(request)
            released.append(request)
        return released

    def finished(self, request: Request) -> None:
        """See `Gate`."""
        self._free += self._reserve(request)

    def __len__(self) -> int:
        return len(self._held)


def _prefills_first(inner: Scheduling) -> IterationPlan | None:
    assert isinstance(inner, Scheduler), "this baseline has one page pool"
    return inner.plan(0, decodes=False) or inner.schedule()


def _capacity(shapes: RunnerShapes) -> int:
    return (shapes.num_pages - 1) * shapes.page_size


POLICIES: dict[str, Policy] = {
    "chunked": Policy(),
    "static": Policy(gate=lambda shapes, _: BatchGate(shapes.max_num_seqs), chunked_prefill=False),
    "prefill-first": Policy(plan_with=_prefills_first, chunked_prefill=False),
    "unchunked": Policy(chunked_prefill=False),
    "contiguous": Policy(
        gate=lambda shapes, _: ReservingGate(_capacity(shapes), lambda _: shapes.max_model_len), chunked_prefill=True
    ),
}
hand_over = Policy(gate=lambda shapes, pool: HandOverGate(pool, shapes.max_num_seqs))


def reserving(reserve: Callable[[Request], int]) -> Policy:
    """Contiguous allocation of so many tokens for each request."""
    return Policy(gate=lambda shapes, _: ReservingGate(_capacity(shapes), reserve))
