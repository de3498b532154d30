"""AsyncLLM without HTTP: iterators, cancelling, bounds, priorities, failures."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from jaxllm import LLM, AsyncLLM, SamplingParams
from jaxllm.engine.errors import EngineError, Unavailable
from jaxllm.telemetry.accounting import Ceilings
from tests.server.live import ENGINE, wait_until

GREEDY = SamplingParams(temperature=0.0, max_tokens=40)


@contextlib.contextmanager
def engine(model, **kwargs):
    llm = AsyncLLM(str(model), use_tqdm=False, **(ENGINE | kwargs))
    try:
        yield llm
    finally:
        llm.shutdown()


async def final(llm, prompt, params=GREEDY, request_id=None):
    last = None
    async for output in llm.generate(prompt, params, request_id):
        last = output
    return last


def test_equals_the_offline_engine_and_grows_monotonically(tiny_model):
    expected = LLM(str(tiny_model), use_tqdm=False, **ENGINE).generate(["abc", "hello"], GREEDY)
    with engine(tiny_model) as llm:

        async def main():
            seen = ""
            async for output in llm.generate("abc", GREEDY, "mine"):
                assert output.request_id == "mine" and output.outputs[0].text.startswith(seen)
                seen = output.outputs[0].text
            return output, await final(llm, "hello")

        outputs = asyncio.run(main())
    for got, want in zip(outputs, expected, strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
        assert got.outputs[0].text == want.outputs[0].text
        assert got.finished and got.outputs[0].finish_reason == want.outputs[0].finish_reason


def test_log_says_what_runs_and_how_near_to_the_roofline(tiny_model, caplog, monkeypatch):
    monkeypatch.setattr("jaxllm.entrypoints.engine_thread._REPORT_SECONDS", 0.0)
    with caplog.at_level("INFO", "jaxllm"), engine(tiny_model) as llm:
        asyncio.run(final(llm, "abc"))
    assert any("running 1, waiting 0; prefill" in line and "MBU" in line for line in caplog.messages)


def test_devices_are_measured_in_a_pause_after_which_mfu_and_mbu_are_known(tiny_model, caplog):
    with caplog.at_level("INFO", "jaxllm"), engine(tiny_model) as llm:
        asyncio.run(final(llm, "abc"))
        assert llm.engine.accounting.recent()["mfu"] is None
        llm.thread.measure_when_idle()
        wait_until(lambda: llm.engine.accounting.ceilings)
        asyncio.run(final(llm, "abc"))
        wait_until(lambda: not llm.engine.has_work)
        recent = llm.engine.accounting.recent()
    assert any("host CPU (measured)" in line for line in caplog.messages)
    assert 0 < recent["mfu"] < 2 and 0 < recent["mbu"] < 2


def test_work_that_arrives_in_a_measurement_goes_first(tiny_model, monkeypatch):
    started = []

    def endless_at_first(model, between):
        started.append(time.monotonic())
        while len(started) == 1:
            between()
            time.sleep(0.001)
        return Ceilings(1e12, 1e11, "test")

    monkeypatch.setattr("jaxllm.entrypoints.engine_thread.measured_ceilings", endless_at_first)
    with engine(tiny_model) as llm:
        llm.thread.measure_when_idle()
        wait_until(lambda: started)
        assert asyncio.run(final(llm, "abc")).finished
        assert len(started) == 1 and llm.engine.accounting.ceilings is None
        wait_until(lambda: llm.engine.accounting.ceilings)
    assert len(started) == 2


def test_device_that_cannot_be_measured_is_asked_once_and_serves_on(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr("jaxllm.entrypoints.engine_thread._IDLE_SECONDS", 0.01)
    monkeypatch.setattr("jaxllm.telemetry.device_peaks.measure_device", lambda *_, **__: 1 / 0)
    with engine(tiny_model) as llm:
        llm.thread.measure_when_idle()
        wait_until(lambda: any("MFU and MBU stay unknown" in line for line in caplog.messages))
        assert asyncio.run(final(llm, "abc")).finished
        time.sleep(0.1)
    assert sum("MFU and MBU stay unknown" in line for line in caplog.messages) == 1


def test_constrained_requests_do_not_change_their_neighbours(tiny_model):
    form = SamplingParams(temperature=0, max_tokens=40, structured_outputs={"regex": "[a-z]{30}"})
    with engine(tiny_model) as llm:

        async def main():
            alone = await final(llm, "abc")
            mixed = await asyncio.gather(*(final(llm, "abc", p) for p in (GREEDY, form, GREEDY, form)))
            return alone, mixed

        alone, mixed = asyncio.run(main())
    assert mixed[0].outputs[0].token_ids == mixed[2].outputs[0].token_ids == alone.outputs[0].token_ids
    assert mixed[1].outputs[0].text == mixed[3].outputs[0].text and mixed[1].outputs[0].text.isalpha()
    assert len(mixed[1].outputs[0].text) == 30


def test_cancelling_and_leaving_free_the_pages(tiny_model):
    with engine(tiny_model) as llm:

        async def main():
            task = asyncio.create_task(final(llm, "abc", SamplingParams(max_tokens=400, ignore_eos=True)))
            async for _ in llm.generate("xyz", SamplingParams(max_tokens=400, ignore_eos=True)):
                break
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        wait_until(lambda: not llm.engine.has_work)
        llm.engine.pool.check([])
        assert llm.num_open == 0


def test_queue_is_bounded_and_priority_goes_first(tiny_model):
    gate = threading.Event()
    gate.set()
    with engine(tiny_model, max_num_seqs=1, max_num_queued_requests=3, before_step=gate.wait) as llm:

        async def main():
            gate.clear()
            order = []

            async def one(name, priority):
                await final(llm, {"prompt": "abc", "priority": priority}, GREEDY, name)
                order.append(name)

            tasks = [asyncio.create_task(one("first", 0))]
            await asyncio.sleep(0.1)
            tasks += [asyncio.create_task(one(f"p{p}", p)) for p in (5, 1, 3)]
            await asyncio.sleep(0.1)
            with pytest.raises(Unavailable, match="full"):
                await final(llm, "abc")
            gate.set()
            await asyncio.gather(*tasks)
            return order

        order = asyncio.run(main())
        assert order.index("p1") < order.index("p3") < order.index("p5")


class Fault:
    """Raises at the given steps."""

    def __init__(self):
        self.steps, self.at, self.error = 0, set(), RuntimeError("injected")

    def __call__(self):
        self.steps += 1
        if self.steps in self.at:
            raise self.error


def test_failed_iteration_ends_its_requests_and_serves_the_next(tiny_model):
    fault = Fault()
    with engine(tiny_model, before_step=fault, max_num_seqs=2) as llm:

        async def main():
            want = await final(llm, "abc")
            fault.at = {fault.steps + 10}
            long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
            running = [asyncio.create_task(final(llm, p, long)) for p in ("abc", "xyz")]
            await asyncio.sleep(0)
            waiting = asyncio.create_task(final(llm, "abc"))
            failed = await asyncio.gather(*running, return_exceptions=True)
            return want, failed, await waiting, await final(llm, "abc")

        want, failed, waited, after = asyncio.run(main())
        assert all(isinstance(f, EngineError) for f in failed), failed
        assert waited.outputs[0].token_ids == after.outputs[0].token_ids == want.outputs[0].token_ids
        assert llm.unhealthy() is None and llm.thread.num_failures == 1
        llm.engine.pool.check([])


def test_failure_on_the_device_is_survived_too(tiny_model):
    """The donated pages are gone: the worst that a failed iteration leaves behind."""
    with engine(tiny_model) as llm:

        async def main():
            want = await final(llm, "abc")
            task = asyncio.create_task(final(llm, "xyz", SamplingParams(max_tokens=400, ignore_eos=True)))
            await asyncio.sleep(0.05)
            for page in llm.engine.runner.state.pages:
                page.delete()
            with pytest.raises(EngineError):
                await task
            return want, await final(llm, "abc")

        want, after = asyncio.run(main())
        assert after.outputs[0].token_ids == want.outputs[0].token_ids


@pytest.mark.parametrize("error", [RuntimeError("again"), SystemExit("dead thread")])
def test_repeated_failure_or_dead_thread_is_final_and_seen(tiny_model, error):
    fault = Fault()
    fault.error = error
    with engine(tiny_model, before_step=fault) as llm:
        fault.at = set(range(1, 10))

        async def main():
            with pytest.raises(EngineError):
                await final(llm, "abc")
            with pytest.raises((EngineError, Unavailable)):
                await final(llm, "abc")
            with pytest.raises(Unavailable, match="dead"):
                await final(llm, "abc")

        asyncio.run(main())
        assert llm.unhealthy() == "the engine is dead"


def test_stuck_engine_is_noticed_and_recovers(tiny_model):
    gate = threading.Event()
    with engine(tiny_model, before_step=gate.wait, stuck_seconds=0.2) as llm:

        async def main():
            task = asyncio.create_task(final(llm, "abc"))
            await asyncio.sleep(0.6)
            assert "no progress" in (llm.unhealthy() or "")
            with pytest.raises(Unavailable, match="no progress"):
                await final(llm, "abc")
            gate.set()
            await task
            assert llm.unhealthy() is None

        time.sleep(0.6)
        assert llm.unhealthy() is None  # idle is not stuck
        asyncio.run(main())


def test_drain_finishes_what_runs_and_refuses_the_rest(tiny_model):
    with engine(tiny_model) as llm:

        async def main():
            task = asyncio.create_task(final(llm, "abc", SamplingParams(max_tokens=100, ignore_eos=True)))
            await asyncio.sleep(0.02)
            drain = asyncio.create_task(llm.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="shutting down"):
                await final(llm, "xyz")
            assert await drain
            assert len((await task).outputs[0].token_ids) == 100

        asyncio.run(main())


def test_refused_prompts_leave_nothing_behind(tiny_model):
    with engine(tiny_model) as llm:

        async def main():
            for bad in ("", "x" * 600, {"prompt_token_ids": [999]}):
                with pytest.raises(ValueError):
                    await final(llm, bad)
            await asyncio.gather(final(llm, "a", request_id="same"), final(llm, "b"))

        asyncio.run(main())
        assert llm.num_open == 0
