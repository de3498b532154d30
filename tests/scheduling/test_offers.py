"""What another engine offers of a request: exactly the tokens that are missing here, and no page that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.host_pool import HostPool
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.tiers import Tiers

C = 4  # tokens per page


@dataclass
class FakeOffer:
    num_tokens: int
    first_token: int = 0
    required: Exception | None = None
    wanted: list[tuple[int, int]] = field(default_factory=list)
    is_closed: bool = False

    def want(self, start: int, stop: int) -> None:
        self.wanted.append((start, stop))

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[Any | None]:
        return [object() for _ in spans]

    def close(self) -> None:
        self.is_closed = True


def scheduler(**pool: Any) -> Scheduler:
    tiers = Tiers(HostPool(0), None, page_bytes=1)
    return Scheduler(PagePool(32, C, **pool), max_num_seqs=4, max_num_batched_tokens=64, tiers=tiers)


def add(made: Scheduler, length: int, offer: FakeOffer | None, first: int = 0) -> Request:
    ids = list(range(first, first + length))
    request = Request(f"r{length}-{first}", ids, SamplingParams(), limit=length + 4, offer=offer)
    made.add(request)
    return request


def arrive(made: Scheduler, *, whole: bool = True) -> None:
    assert made.tiers is not None
    for load in made.tiers.take_loads():
        made.loaded(load, [whole] * len(load.keys))


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("caching", [True, False])
def test_every_computed_token_is_wanted_once_and_the_last_is_computed_here(length: int, caching: bool) -> None:
    made, offer = scheduler(enable_prefix_caching=caching), FakeOffer(length)
    request = add(made, length, offer)
    made.schedule()
    assert sum(stop - start for start, stop in offer.wanted) == length - 1
    assert all(start % C == 0 and stop - start <= C for start, stop in offer.wanted)
    arrive(made)
    assert offer.is_closed and request.offer is None
    if length == 1:
        return
    plan = made.schedule()
    assert plan is not None and [(c.start, c.count) for c in plan.chunks] == [(length - 1, 1)]


def test_what_is_cached_is_not_wanted_and_a_part_filled_page_is_nobody_elses() -> None:
    made = scheduler()
    add(made, 9, FakeOffer(9))
    made.schedule()
    arrive(made)
    offer = FakeOffer(13)
    again = add(made, 13, offer)
    made.schedule()
    assert offer.wanted == [(8, 12)]  # its first two pages came for the other
    assert again.pages[:2] == made.running[0].pages[:2] and again.pages[2] != made.running[0].pages[2]


def test_a_load_that_fails_is_computed_and_no_page_is_lost() -> None:
    made, offer = scheduler(), FakeOffer(9)
    request = add(made, 9, offer)
    made.schedule()
    arrive(made, whole=False)
    assert offer.is_closed and request.offer is None
    plan = made.schedule()
    assert plan is not None and [(c.start, c.count) for c in plan.chunks] == [(0, 9)]
    made.append_tokens(request, [1], 1)
    made.finish(request, "abort")
    made.pool.check([])


def test_who_leaves_while_pages_come_closes_the_offer() -> None:
    made, offer = scheduler(), FakeOffer(9)
    request = add(made, 9, offer)
    made.schedule()
    made.finish(request, "abort")
    assert offer.is_closed
    arrive(made)
    made.pool.check([])


def test_with_a_window_only_what_is_seen_is_wanted_and_a_headless_page_is_not_found() -> None:
    made, offer = scheduler(window=6), FakeOffer(17, first_token=10)
    request = add(made, 17, offer)
    made.schedule()
    assert offer.wanted == [(10, 12), (12, 16)]  # the query at 16 sees from 11 on
    arrive(made)
    made.schedule()
    made.append_tokens(request, [1], 1)
    made.finish(request, "length")
    digests = made.pool.hashes(list(range(17)), "")
    assert not made.pool.has(digests[2]) and made.pool.has(digests[3])
    made.pool.check([])


def test_an_offer_with_a_gap_before_it_is_declined() -> None:
    made, offer = scheduler(), FakeOffer(17, first_token=8)
    request = add(made, 17, offer)
    plan = made.schedule()
    assert offer.is_closed and not offer.wanted and request.held.load is None
    assert plan is not None and plan.chunks[0].count == 17


def test_a_request_that_goes_elsewhere_leaves_its_pages_to_whoever_took_it() -> None:
    made = scheduler()
    request = add(made, 9, None)
    request.stepwise = True
    made.schedule()
    made.append_tokens(request, [1], 1)
    pages = made.detach(request)
    assert len(pages) == 3 and not made.running and not request.pages
    made.pool.check([pages])
    made.pool.free(pages)
    made.pool.check([])
    assert made.pool.has(made.pool.hashes(list(range(9)), "")[1])
