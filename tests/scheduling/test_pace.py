"""Chunks beside decodes that somebody reads along keep to a time, and prompts go on whatever that is."""

from __future__ import annotations

import pytest

from jaxllm.config.sampling import SamplingParams
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import Request
from jaxllm.scheduling.scheduler import Scheduler

SIZES = (64, 128, 512)


def request(name, num_tokens, *, streamed=True):
    params = SamplingParams(max_tokens=50)
    made = Request(name, list(range(num_tokens)), params, limit=num_tokens + 50, stop_ids=frozenset(), seed=0)
    made.streamed = streamed
    return made


def scheduler(pace):
    return Scheduler(PagePool(400, 16), max_num_seqs=32, max_num_batched_tokens=512, max_decode_steps=4, pace=pace)


def test_the_largest_size_that_keeps_to_the_target_is_taken():
    pace = Pace(SIZES, target=0.1)
    assert pace.most(8) == 512, "nothing is known"
    pace.observe(500, 0.3)
    assert pace.most(8) == 128, "a fifth of the tokens, a quarter of the time, until it is known better"
    pace.observe(100, 0.12)
    assert pace.most(8) == 64
    for _ in range(20):
        pace.observe(90, 0.05)
    assert pace.most(8) == 128
    for _ in range(20):
        pace.observe(90, 0.01)
    assert pace.most(8) == 512, "what was given up is tried again where the machine has become faster"
    assert Pace(SIZES).most(8) == 512, "without a target nothing is bounded"


@pytest.mark.parametrize(("decodes", "most"), [(0, 64), (48, 64), (49, 128), (300, 512), (512, 512)])
def test_a_prompt_always_goes_on(decodes, most):
    pace = Pace(SIZES, target=1e-6)
    for size in SIZES:
        pace.observe(size, 1.0)
    assert pace.most(decodes) == most


@pytest.mark.parametrize(("streamed", "tokens"), [(True, 64), (False, 512)])
def test_only_streams_bound_the_chunks_beside_them(streamed, tokens):
    pace = Pace(SIZES, target=0.1)
    pace.observe(500, 1.0)
    chooser = scheduler(pace)
    chooser.add(request("first", 40, streamed=streamed))
    plan = chooser.schedule()
    assert plan.num_tokens == 40
    chooser.append_tokens(plan.chunks[0].request, [7], 1)
    chooser.add(request("long", 3000))
    plan = chooser.schedule()
    assert [chunk.count for chunk in plan.chunks] == [1, tokens - 1] and plan.most_tokens == tokens


def test_nobody_decodes_nobody_waits():
    pace = Pace(SIZES, target=0.1)
    pace.observe(500, 1.0)
    chooser = scheduler(pace)
    chooser.add(request("long", 3000))
    assert chooser.schedule().num_tokens == 512
