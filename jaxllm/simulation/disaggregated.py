"""Prefill and decode in pools of their own: prompts are computed in one, their pages cross a link, the other goes on.

Pages stream while the prompt is computed: each chunk's leave while the next runs, so that what is seen of the transfer
is the last chunk's, or the queue on the link. Full pages become cached pages of the receiver, where the request finds
them by their hash; what it has already does not travel. The last, part-filled page is computed again there.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.roofline.chips import GB, INFINIBAND_HDR, INFINIBAND_NDR, PCIE_GEN4, PCIE_GEN5, Chip, Torus
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.replicas import Scheduling
from jaxllm.scheduling.request import Ending, Request
from jaxllm.simulation.arrivals import Arrival
from jaxllm.simulation.fleet import Results, request_of, run_until
from jaxllm.simulation.outcomes import Outcome
from jaxllm.simulation.paper_engine import PaperEngine

LINKS = {"pcie4": PCIE_GEN4, "pcie5": PCIE_GEN5, "hdr": INFINIBAND_HDR, "ndr": INFINIBAND_NDR}


def link_bandwidth(name: str, chip: Chip, field: str = "transfer") -> float:
    """Bytes per second, one way, of each device's link. Raises ValueError for an unknown one."""
    if name in LINKS:
        return LINKS[name]
    link = chip.interconnect
    if name in ("nvlink", "ici") and link is not None:
        return link.link_bandwidth if isinstance(link, Torus) else link.bandwidth
    if name == "dcn" and chip.dcn_bandwidth is not None:
        return chip.dcn_bandwidth
    try:
        bandwidth = float(name) * GB
    except ValueError:
        bandwidth = math.nan
    if not 0 < bandwidth < math.inf:
        known = ", ".join((*LINKS, "nvlink or ici", "dcn"))
        raise ValueError(f"{field}={name!r}; use {known} (where the chip has one), or a number of GB/s")
    return bandwidth


@dataclass(slots=True)
class Link:
    """One engine's way out: transfers follow each other.

    Attributes:
        bytes_per_s: of all its devices together.
        free_at: when what was sent so far is through.
    """

    bytes_per_s: float
    free_at: float = 0.0
    num_transfers: int = 0
    num_bytes: float = 0.0
    exposed_s: float = 0.0

    def send(self, num_bytes: float, since: float, until: float, last_bytes: float) -> float:
        """When all is there: it comes into being from `since` to `until`, its last `last_bytes` then."""
        self.free_at = max(self.free_at, since) + num_bytes / self.bytes_per_s
        end = max(self.free_at, until + last_bytes / self.bytes_per_s)
        self.num_transfers += 1
        self.num_bytes += num_bytes
        self.exposed_s += end - until
        return end


@dataclass(slots=True)
class HandOverGate:
    """Requests whose pages have come wait here until the decode engine has a slot and room; then they are put there."""

    pool: PagePool
    max_num_seqs: int
    held: deque[Request] = field(default_factory=deque)

    def hold(self, request: Request) -> None:
        """See `Gate`."""
        self.held.append(request)

    def release(self, scheduler: Scheduling) -> Sequence[Request]:
        """See `Gate`."""
        released, pool = [], self.pool
        running = len(scheduler.running) + scheduler.num_waiting
        while self.held and running + len(released) < self.max_num_seqs:
            request = self.held[0]
            needed = pool.pages_for(request.num_tokens) + running + len(released) + 1
            if pool.num_free < needed + sum(pool.pages_for(r.num_tokens) for r in released):
                break
            self._put(request)
            released.append(self.held.popleft())
        return released

    def _put(self, request: Request) -> None:
        """What has come becomes cached pages that the request finds when it is admitted, in the same plan."""
        pool = self.pool
        request.page_hashes = pool.hashes(request.token_ids, request.cache_salt)
        digests = [d for d in request.page_hashes[: request.num_prompt // pool.page_size] if not pool.has(d)]
        pages = pool.allocate(len(digests))
        assert pages is not None, "there was room"
        for page, digest in zip(pages, digests, strict=True):
            pool.publish(page, digest)
        pool.free(pages)

    def finished(self, request: Request) -> None:
        """See `Gate`."""

    def __len__(self) -> int:
        return len(self.held)


@dataclass(slots=True)
class Crossing:
    """Listens to a request in the prefill pool; at its first token it sends the request on."""

    fleet: Disaggregated
    outcome: Outcome
    arrival: Arrival
    prefill: int

    def take(self, request: Request, tokens: Sequence[int], sampled: Any, ending: Ending | None) -> Ending | None:
        """See `Listener`."""
        return self.outcome.take(request, tokens, sampled, ending)

    def end(self, request: Request) -> None:
        """See `Listener`."""
        if self.arrival.output_len == 1:
            self.outcome.end(request)
        else:
            self.fleet.hand_over(self, request)

    def rewind(self, request: Request) -> bool:
        """See `Listener`."""
        return True


class Disaggregated:
    """Prefill engines, decode engines, and links between them.

    A request goes to the prefill engine that will have computed it first: its queue, and what it lacks of the prefix
    (Mooncake's conductor, without remote prefixes); then to the decode engine with the fewest requests.
    """

    def __init__(self, prefill: Sequence[PaperEngine], decode: Sequence[PaperEngine], *, bytes_per_s: float):
        self.prefill, self.decode = prefill, decode
        self.engines = [*prefill, *decode]
        self.prompt_engines = prefill
        self.num_devices = sum(engine.num_devices for engine in self.engines)
        self.links = [Link(bytes_per_s * min(p.num_devices, decode[0].num_devices)) for p in prefill]
        self._arriving: list[tuple[float, int, Request, Outcome, int]] = []
        self._numbers = itertools.count()
        self._expected = [0] * len(decode)  # requests on their way to each
        self._queued = [0] * len(prefill)  # prompt tokens that each has to compute

    def run_until(self, time: float) -> None:
        """See `Fleet`; decode engines run from one hand-over to the next."""
        for engine in self.prefill:
            run_until(engine, time)
        while self._arriving and self._arriving[0][0] <= time:
            at, _, request, outcome, target = heapq.heappop(self._arriving)
            for engine in self.decode:
                run_until(engine, at)
            self._expected[target] -= 1
            outcome.clock = self.decode[target].clock
            self.decode[target].engine.add(request)
        for engine in self.decode:
            run_until(engine, time)

    def send(self, arrival: Arrival, results: Results) -> None:
        """See `Fleet`."""
        outcome = Outcome(arrival.at, arrival.input_len, arrival.output_len, self.prefill[0].clock, results.gaps)
        results.outcomes.append(outcome)
        request = request_of(arrival, outcome, limit=arrival.input_len + 1)
        number = self._least_queued(request)
        engine = self.prefill[number]
        outcome.clock = engine.clock
        request.listener = Crossing(self, outcome, arrival, number)
        self._queued[number] += arrival.input_len
        engine.engine.add(request)

    def figures(self, slo: Mapping[str, float]) -> dict[str, float]:
        """What pools' report has beside others: `exposed_s` is what requests waited for pages on the link."""
        return {
            "transfers": sum(link.num_transfers for link in self.links),
            "transferred_bytes": sum(link.num_bytes for link in self.links),
            "transfer_exposed_s": sum(link.exposed_s for link in self.links),
        }

    def _least_queued(self, request: Request) -> int:
        if len(self.prefill) == 1:
            return 0
        pools = [engine.scheduling.pool for engine in self.prefill]
        hits = [0] * len(pools)
        if pools[0].enable_prefix_caching:  # type: ignore[union-attr]
            request.page_hashes = pools[0].hashes(request.token_ids, "")  # type: ignore[union-attr]
            hits = [pool.num_cached(request.page_hashes) * pool.page_size for pool in pools]  # type: ignore[union-attr]
        return min(range(len(pools)), key=lambda i: self._queued[i] - hits[i])

    def hand_over(self, crossing: Crossing, request: Request) -> None:
        """A prompt is computed: its pages cross, and the request follows them."""
        engine, arrival, outcome = self.prefill[crossing.prefill], crossing.arrival, crossing.outcome
        self._queued[crossing.prefill] -= arrival.input_len
        target = min(range(len(self.decode)), key=lambda i: self._expected[i] + self.decode[i].load)
        pool: PagePool = self.decode[target].scheduling.pool  # type: ignore[assignment]
        now, budget = engine.clock.now, engine.runner.shapes.max_num_batched_tokens
        cached = pool.num_cached(request.page_hashes) * pool.page_size if pool.enable_prefix_caching else 0
        row = engine.runner.token_bytes
        moved = max(0, arrival.input_len - cached)
        last = min(moved, budget if moved % budget == 0 else moved % budget)
        end = self.links[crossing.prefill].send(
            row * moved, max(outcome.at, now - self._span(crossing)), now, row * last
        )
        follower = request_of(arrival, outcome)
        follower.token_ids.append(0)
        follower.num_prompt = arrival.input_len
        follower.num_delivered = arrival.input_len + 1
        self._expected[target] += 1
        heapq.heappush(self._arriving, (end, next(self._numbers), follower, outcome, target))

    def _span(self, crossing: Crossing) -> float:
        """Seconds for which its pages have been coming into being: none for a prompt of one chunk."""
        engine = self.prefill[crossing.prefill]
        chunks = math.ceil(crossing.arrival.input_len / engine.runner.shapes.max_num_batched_tokens)
        return (chunks - 1) * engine.runner.last_seconds
