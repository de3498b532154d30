"""Admission by SLO: what would miss it is refused before it costs anybody anything."""

from __future__ import annotations

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm import SamplingParams
from jaxllm.engine.errors import Unavailable
from jaxllm.entrypoints.admission import Admission
from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.entrypoints.prediction import IterationCost, iteration_cost_of, slot_seconds, token_seconds
from jaxllm.roofline.cost_model import Cost
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.request import page_salt
from jaxllm.telemetry.accounting import IterationRecord


def record(tokens: int = 0, decodes: int = 0, seconds: float = 1.0) -> IterationRecord:
    return IterationRecord(
        num_tokens=tokens + decodes,
        num_decodes=decodes,
        num_steps=1,
        request_ids=(),
        num_prefill_tokens=tokens,
        num_sampled=decodes,
        flops=float(tokens),
        bytes=0.0,
        seconds=seconds,
        compiled=False,
        mfu=None,
        mbu=None,
    )


BUDGET = 1000


class Linear:
    """One operation per token."""

    def attended(self, rows: Any) -> tuple[int, int]:
        return 0, 0

    def cost(self, *, tokens: int, **_: Any) -> Cost:
        return Cost(float(tokens), 0.0)


def engine(
    *records: IterationRecord, unfinished: Any = (), running: Any = (), waiting: int = 0, in_flight: int = 0
) -> Any:
    made = SimpleNamespace(
        num_in_flight=in_flight,
        records=deque(records),
        accounting=SimpleNamespace(model=Linear()),
        unfinished=list(unfinished),
        scheduler=SimpleNamespace(running=list(running), num_waiting=waiting),
        runner=SimpleNamespace(shapes=SimpleNamespace(spare_slot=4, max_num_batched_tokens=BUDGET)),
        memory=SimpleNamespace(pools=[PagePool(64, 16)]),
        pace=Pace((100, BUDGET)),
    )
    made.scoring_engine = made
    return made


def job(length: int) -> Any:
    output = SimpleNamespace(prompt_token_ids=list(range(length)))
    return SimpleNamespace(
        output=output, asked=None, adapter=None, requests=[], finished=False, first_token=None, created=0.0
    )


def request(left: int, limit: int = 0) -> Any:
    return SimpleNamespace(num_left=left, num_tokens=left, finished=False, limit=limit or left, slot=0, streamed=True)


def test_what_waits_and_what_is_cached_is_counted() -> None:
    made = engine(record(tokens=100, seconds=0.5), unfinished=[request(300)])
    admission = Admission(made, {"ttft": 2.0})
    assert admission.predicted_ttft([job(100)]) == pytest.approx((300 + 100) / 200)
    made.unfinished.append(request(1))  # decodes: one more token in the iteration
    assert admission.predicted_ttft([job(100)]) == pytest.approx((300 + 100 + 1) / 200)
    pool = made.memory.pools[0]
    for page, digest in zip(pool.allocate(4), pool.hashes(list(range(64)), ""), strict=True):
        pool.publish(page, digest)
    assert admission.predicted_ttft([job(100)]) == pytest.approx((300 + 36 + 1) / 200)


def test_cached_pages_are_an_adapters_own() -> None:
    made = engine(record(tokens=100, seconds=0.5))
    pool, adapted = made.memory.pools[0], job(100)
    adapted.adapter = SimpleNamespace(identity="abc", arrays=None)
    for page, digest in zip(
        pool.allocate(4), pool.hashes(list(range(64)), page_salt("", adapted.adapter)), strict=True
    ):
        pool.publish(page, digest)
    admission = Admission(made, {})
    assert admission.predicted_ttft([adapted]) == pytest.approx(36 / 200)
    assert admission.predicted_ttft([job(100)]) == pytest.approx(100 / 200)


def test_iterations_on_the_device_are_waited_for_and_short_prompts_pass_long_ones() -> None:
    records = [record(tokens=tokens, seconds=0.1 + tokens / 1000) for tokens in (100, 200, 300, 400)]
    assert iteration_cost_of(engine(*records)) == IterationCost(pytest.approx(0.1), pytest.approx(0.001))
    busy = engine(*records, in_flight=2)
    assert Admission(busy, {}).predicted_ttft([job(100)]) == pytest.approx(0.2 + 1.5 * 0.35)
    long = engine(*records, unfinished=[request(5000)])  # leaves half of each iteration to the short one
    assert Admission(long, {}).predicted_ttft([job(100)]) == pytest.approx(0.1 + 0.6)
    assert Admission(long, {}).predicted_ttft([job(600)]) == pytest.approx(6 * 0.1 + 5.6)


def test_beside_answers_that_are_read_along_iterations_are_as_short_as_the_pace_has_them() -> None:
    records = [record(tokens=tokens, seconds=0.1 + tokens / 1000) for tokens in (100, 200, 300, 400)]
    made = engine(*records, unfinished=[request(1)])
    one = pytest.approx(0.1 + 0.4 + 0.001)  # the other one's next token goes with it
    assert Admission(made, {}).predicted_ttft([job(400)]) == one
    made.pace = Pace((100, BUDGET), target=0.2)
    made.pace.observe(100, 0.1)
    made.pace.observe(BUDGET, 1.0)
    assert Admission(made, {}).predicted_ttft([job(400)]) == pytest.approx(5 * 0.1 + 0.4 + 5 * 0.001)
    made.unfinished[0].streamed = False
    assert Admission(made, {}).predicted_ttft([job(400)]) == one


def test_a_slot_is_waited_for() -> None:
    running = [request(1, limit=limit) for limit in (11, 21, 31, 41)]
    made = engine(record(tokens=100, seconds=0.5), record(decodes=4, seconds=0.1), running=running)
    assert slot_seconds(made, 1) == pytest.approx(10 * 0.1)
    assert Admission(made, {}).predicted_ttft([job(100)]) == pytest.approx(0.5 + 10 * 0.1)


def test_time_per_token_grows_with_the_rows() -> None:
    made = engine(record(decodes=2, seconds=0.02), record(decodes=4, seconds=0.04), running=[request(1)] * 4)
    assert token_seconds(made, 4) == pytest.approx(0.08)
    assert token_seconds(engine(), 1) is None and Admission(engine(), {}).predicted_ttft([job(9)]) is None


def test_refusals_say_when_to_come_again_and_errors_are_kept() -> None:
    made = engine(record(tokens=100, seconds=0.5))
    admission = Admission(made, {"ttft": 2.0})
    with pytest.raises(Unavailable, match=r"the ttft would be about 2.5 s and the SLO is 2 s") as refused:
        admission.check([job(500)])
    assert refused.value.retry_after == 1 and admission.num_refused == 1
    good = job(100)
    admission.check([good])
    good.first_token = 2.0  # predicted 0.5
    assert [figure.value for figure in admission.figures()] == [1, pytest.approx(0.75)]
    assert admission.margin == pytest.approx(1.5)
    with pytest.raises(Unavailable, match=r"would be about 2.25 s"):  # 0.75, and what predictions lack
        admission.check([job(150)])
    with pytest.raises(ValueError, match="e2e cannot be predicted"):
        Admission(made, {"e2e": 1.0})


def test_an_engine_with_an_slo_refuses_what_would_miss_it(tiny_llama) -> None:
    async def ask(first: int) -> None:
        prompt = {"prompt_token_ids": [first, *range(1, 64)]}
        async for _ in llm.generate(prompt, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)):
            pass

    llm = AsyncLLM(
        str(tiny_llama),
        slo="ttft:0.01ms",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=2,
        use_tqdm=False,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=1 << 20,
    )
    try:
        with pytest.raises(Unavailable, match="SLO"):  # nothing is known before the first prefills have run
            for first in range(4):
                asyncio.run(ask(first))
        assert llm.admission is not None and llm.admission.num_refused == 1
        assert not llm.engine.has_work
    finally:
        llm.shutdown()
