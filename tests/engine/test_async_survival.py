"""`AsyncLLM` outlives its users: any mix of requests, cancellations, refusals and failures of the device.

Random orders on a fake device, as in `test_survival`. More with JAXLLM_FULL_TESTS=1.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.engine.errors import EngineError, NotFinite, Unavailable
from tests.engine.test_survival import BAD, FULL, Request, nothing_is_left
from tests.helpers.fake_llm import FakeModel
from tests.helpers.fake_runner import POISON

NUM_ORDERS = 300 if FULL else 20
SECONDS = 60.0
ENDS = (EngineError, Unavailable)  # what a failure of the device may do to a request


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeModel:
    return FakeModel(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def oracle(fake: FakeModel) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        return fake.make(LLM, patch, {"num_pages": 400, "max_num_seqs": 8})


async def last_of(llm: AsyncLLM, prompt: Any, params: SamplingParams, request_id: Any = None) -> Any:
    last = None
    async for output in llm.generate(prompt, params, request_id):
        texts = [c.text for c in last.outputs] if last else []
        assert all(c.text.startswith(before) for c, before in zip(output.outputs, texts, strict=False))
        last = output
    return last


class Order:
    """One random sequence of calls on one `AsyncLLM`."""

    def __init__(self, llm: AsyncLLM, oracle: LLM, rng: random.Random):
        self.llm, self.oracle, self.rng = llm, oracle, rng
        self.runner: Any = llm.engine.runner

    async def one(self) -> None:
        """Any call; it is answered rightly, refused, or ended by a failure of the device, and soon."""
        kind = self.rng.choice(
            [self.generate, self.generate, self.leave, self.refused, self.poisoned, self.embed, self.beam_search]
        )
        try:
            await asyncio.wait_for(kind(), SECONDS)
        except ENDS:
            assert self.runner.num_failures or self.llm.thread.num_failures, "nothing had failed"

    async def generate(self) -> None:
        r = Request(self.rng, self.oracle)
        if r.params.prompt_logprobs is None:
            output = await last_of(self.llm, r.prompt, r.params)
            assert [c.token_ids for c in output.outputs] == [c.token_ids for c in r.expected.outputs]
            assert [c.text for c in output.outputs] == [c.text for c in r.expected.outputs]
            assert [c.logprobs for c in output.outputs] == [c.logprobs for c in r.expected.outputs]
            assert output.finished
        else:
            stream = await self.llm.open([r.prompt], r.params, streamed=False)
            try:
                async for _ in stream:
                    pass
            finally:
                stream.cancel()
            r.check(stream.outputs[0])

    async def leave(self) -> None:
        r = Request(self.rng, self.oracle)
        left = self.rng.randrange(1, 6)
        async for _ in self.llm.generate(r.prompt, r.params):
            left -= 1
            if not left:
                return

    async def refused(self) -> None:
        prompt, asked = self.rng.choice(BAD)
        with pytest.raises(ValueError) as caught:
            await last_of(self.llm, prompt, SamplingParams(max_tokens=2, **asked))
        assert "\n" not in str(caught.value)

    async def poisoned(self) -> None:
        r = Request(self.rng, self.oracle, poison=True)
        if r.expected.error is None:
            return
        with pytest.raises(NotFinite):
            await last_of(self.llm, r.prompt, r.params)

    async def embed(self) -> None:
        ids = [[self.rng.randrange(1, 97) for _ in range(self.rng.randrange(1, 40))] for _ in range(3)]
        for prompt, vector in zip(ids, await self.llm.embed(ids), strict=True):
            expected = np.array([sum(prompt), sum(i * i for i in prompt)], np.float32)
            assert np.allclose(vector, expected / np.linalg.norm(expected), atol=1e-4)
        with pytest.raises(NotFinite):
            await self.llm.embed([[*ids[0], POISON]])

    async def beam_search(self) -> None:
        r, params = Request(self.rng, self.oracle), BeamSearchParams(beam_width=self.rng.randrange(1, 4), max_tokens=6)
        got = await self.llm.beam_search(r.prompt, params)
        assert [got] == self.oracle.beam_search(r.prompt, params)

    async def run(self) -> None:
        for _ in range(4):
            if self.rng.random() < 0.4:
                self.runner.fail_in = self.rng.randrange(1, 30)
            await asyncio.gather(*(self.one() for _ in range(self.rng.randrange(1, 6))))
        self.runner.fail_in = 0
        for _ in range(1000):
            if not self.llm.engine.unfinished and not self.llm.thread.num_queued:
                break
            await asyncio.sleep(0.01)
        if self.llm.unhealthy() is None:
            await self.generate()
            await asyncio.sleep(0.01)
            nothing_is_left(self.llm.engine)
        assert self.llm.num_open == 0


@pytest.mark.parametrize("chunk", range(NUM_ORDERS // 10))
def test_any_order_of_requests_cancellations_and_failures_is_survived(fake, oracle, monkeypatch, chunk):
    for seed in range(10 * chunk, 10 * chunk + 10):
        rng = random.Random(seed)
        llm = fake.make(AsyncLLM, monkeypatch, {"num_pages": rng.choice([40, 60, 200])}, max_num_queued_requests=20)
        try:
            asyncio.run(asyncio.wait_for(Order(llm, oracle, rng).run(), 3 * SECONDS))
        except BaseException as error:
            error.add_note(f"order {seed}")
            raise
        finally:
            llm.shutdown()


def test_without_recovery_failures_of_the_device_are_felt(fake, oracle, monkeypatch):
    """The property above can fail."""
    monkeypatch.setattr(Engine, "recover", lambda self: setattr(self, "is_sound", True))
    failed = 0
    for seed in range(8):
        llm = fake.make(AsyncLLM, monkeypatch, {})
        try:
            asyncio.run(asyncio.wait_for(Order(llm, oracle, random.Random(seed)).run(), 3))
        except Exception:
            failed += 1
        llm.shutdown()
    assert failed >= 2


def test_a_thread_that_dies_ends_what_runs_waits_and_comes(fake, monkeypatch):
    llm = fake.make(AsyncLLM, monkeypatch, {}, before_step=lambda: (_ for _ in ()).throw(SystemExit("dead")))
    params = SamplingParams(temperature=0.0, max_tokens=5)

    async def main() -> list[Any]:
        calls = (last_of(llm, "abc", params) for _ in range(8))
        early = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)
        stream = llm._opened(_stream(llm))  # as one that came in just before the end
        llm.thread.submit(llm._jobs.prepare("abc", params), stream.listeners[0])
        with pytest.raises(EngineError):
            await asyncio.wait_for(anext(aiter(stream)), 20)
        return early

    ends = asyncio.run(main())
    assert all(isinstance(end, ENDS) for end in ends), ends
    with pytest.raises(Unavailable, match="dead"):
        asyncio.run(last_of(llm, "abc", params))


def _stream(llm: AsyncLLM) -> Any:
    from jaxllm.entrypoints.async_llm import Stream

    return Stream(llm, [], 1, 1)


@pytest.mark.parametrize("name", [5, ["a"], b"x"])
def test_a_name_that_is_no_text_is_refused(fake, monkeypatch, name):
    llm = fake.make(AsyncLLM, monkeypatch, {})
    with pytest.raises(ValueError, match="request_id"):
        asyncio.run(last_of(llm, "abc", SamplingParams(max_tokens=2), name))
    llm.shutdown()
