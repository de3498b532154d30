"""An engine outlives its users: any mix of calls, refusals, failures and interrupts, at any point.

Random orders on a fake device that knows which tokens are whose. After each of them: no hang, no wrong text, no page
leaked. What is right is what an undisturbed engine says to the same request alone. Many more with JAXLLM_FULL_TESTS=1.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, BeamSearchParams, SamplingParams
from tests.helpers.fake_device import naive_generate
from tests.helpers.fake_llm import FakeModel
from tests.helpers.fake_runner import POISON
from tests.helpers.interrupts import raised_at

FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
NUM_ORDERS, NUM_ASYNC_ORDERS = (1000, 300) if FULL else (60, 20)
SECONDS = 60.0  # for one order: far more than it takes


class Request:
    """A random request and its answer."""

    def __init__(self, rng: random.Random, oracle: LLM, *, poison: bool = False):
        shared = [rng.randrange(97, 123) for _ in range(3)] * 5
        ids = shared[: rng.randrange(1, 16)] + [rng.randrange(97, 123) for _ in range(rng.randrange(1, 14))]
        if poison:
            ids[rng.randrange(len(ids))] = POISON
        kind = rng.randrange(8)
        asked: dict[str, Any] = {"temperature": 0.0, "max_tokens": rng.randrange(1, 30)}
        if kind == 0:
            asked["stop"] = [chr(rng.randrange(40, 90)), "ab"]
        elif kind == 1:
            asked["stop_token_ids"] = [rng.randrange(100) for _ in range(8)]
        elif kind == 2:
            asked["structured_outputs"] = {"regex": "[a-f]{2,9}(x|yz)"}
        elif kind == 3:
            asked["logprobs"] = 2
        elif kind == 4:
            asked["prompt_logprobs"] = 1
        elif kind == 5 and not poison:
            asked["n"] = rng.randrange(2, 4)
        self.params = SamplingParams(**asked)
        fields: dict[str, Any] = {"prompt_token_ids": np.array(ids) if rng.random() < 0.2 else ids}
        if rng.random() < 0.3:
            fields |= {"priority": rng.choice([-1, np.int64(2)]), "cache_salt": rng.choice(["", "salt"])}
        self.prompt = fields
        self.expected = oracle.generate(self.prompt, self.params, use_tqdm=False)[0]
        if kind >= 5:
            naive = naive_generate(ids, len(ids) + self.params.max_tokens, frozenset({257}))
            assert poison or self.expected.outputs[0].token_ids == naive[len(ids) :]

    def check(self, output: Any) -> None:
        """It is the right answer."""
        expected = self.expected
        assert output.finished and output.error == expected.error
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
        assert [c.text for c in output.outputs] == [c.text for c in expected.outputs]
        assert [c.finish_reason for c in output.outputs] == [c.finish_reason for c in expected.outputs]
        assert output.outputs == expected.outputs and output.prompt_logprobs == expected.prompt_logprobs


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeModel:
    return FakeModel(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="module")
def oracle(fake: FakeModel) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        return fake.make(LLM, patch, {"num_pages": 400, "max_num_seqs": 8})


BAD: list[tuple[Any, Any]] = [
    ({"prompt": "x", "priority": None}, {}),
    ({"prompt": "x", "priority": "high"}, {}),
    ({"prompt": "x", "priority": 1.5}, {}),
    ({"prompt": "x", "cache_salt": 7}, {}),
    ({"prompt": "x", "cache_salt": "\ud800"}, {}),
    ({"prompt": "x", "cache_salt": ["a"]}, {}),
    ({"prompt": "x\udc00"}, {}),
    ({"prompt": 5}, {}),
    ({"prompt_token_ids": 5}, {}),
    ({"prompt_token_ids": [1.5]}, {}),
    ({"prompt_token_ids": [None]}, {}),
    ({"prompt_token_ids": [[1], [2]]}, {}),
    ({"prompt_token_ids": "abc"}, {}),
    ({"prompt_token_ids": [2**70]}, {}),
    ({"prompt_token_ids": np.array([[1, 2], [3, 4]])}, {}),
    ("", {}),
    ([], {}),
    ({"prompt": "x", "images": ["y"]}, {}),
    ({"prompt_token_ids": [1] * 200}, {}),
    ("x", {"stop_token_ids": [999]}),
    ("x", {"logit_bias": {999: 1.0}}),
    ("x", {"structured_outputs": {"regex": "("}}),
    (b"x", {}),
    ([5, "x"], {}),
]


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fail where something hangs."""

    def late(*_: Any) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def nothing_is_left(engine: Any) -> None:
    """Every page is free and nobody waits."""
    assert engine.is_sound and not engine.unfinished
    engine.pool.check([])
    assert engine.pool.num_free == engine.pool.num_usable
    assert not engine.scheduler.running and not engine.scheduler.num_waiting


class Order:
    """One random sequence of calls on one `LLM`."""

    def __init__(self, llm: LLM, oracle: LLM, rng: random.Random):
        self.llm, self.oracle, self.rng = llm, oracle, rng
        self.runner: Any = llm.engine.runner
        self.streams: list[tuple[Any, Request, list[str]]] = []
        self.struck: list[str] = []

    def request(self) -> Request:
        return Request(self.rng, self.oracle)

    def generate(self) -> None:
        requests = [self.request() for _ in range(self.rng.randrange(1, 5))]
        outputs = self.llm.generate([r.prompt for r in requests], [r.params for r in requests], use_tqdm=False)
        for r, output in zip(requests, outputs, strict=True):
            r.check(output)

    def beam_search(self) -> None:
        r, params = self.request(), BeamSearchParams(beam_width=self.rng.randrange(1, 4), max_tokens=6)
        (got,), (expected,) = (llm.beam_search(r.prompt, params) for llm in (self.llm, self.oracle))
        assert got == expected

    def open_stream(self) -> None:
        if len(self.streams) < 3:
            r = self.request()
            self.streams.append((self.llm.stream(r.prompt, r.params), r, []))

    def read_stream(self) -> None:
        if not self.streams:
            return
        stream, r, pieces = item = self.rng.choice(self.streams)
        text = r.expected.outputs[0].text
        self.streams.remove(item)  # an exception is its end
        for _ in range(self.rng.randrange(1, 9)):
            if (piece := next(stream, None)) is None:
                assert "".join(pieces) == text
                return
            pieces.append(piece)
            assert text.startswith("".join(pieces))
        self.streams.append(item)

    def leave_stream(self) -> None:
        if self.streams:
            self.streams.pop(self.rng.randrange(len(self.streams)))[0].close()

    def refused(self) -> None:
        prompt, asked = self.rng.choice(BAD)
        params = SamplingParams(max_tokens=2, **asked)
        call = self.rng.choice([self.llm.generate, self.llm.stream])
        with pytest.raises(ValueError) as caught:
            list(call([prompt] if call == self.llm.generate else prompt, params))
        assert "\n" not in str(caught.value)

    def poisoned(self) -> None:
        bad, good = Request(self.rng, self.oracle, poison=True), self.request()
        outputs = self.llm.generate([bad.prompt, good.prompt], [bad.params, good.params], use_tqdm=False)
        good.check(outputs[1])
        bad.check(outputs[0])

    def failing(self) -> None:
        """The device fails in some call: that call raises, or has a right answer."""
        self.runner.fail_in = self.rng.randrange(1, 12)
        self.runner.fail_resets = self.rng.choice([0, 0, 0, 1])
        with contextlib.suppress(RuntimeError):
            self.any_call()
        self.runner.fail_in = 0
        while self.runner.fail_resets:
            self.runner.fail_resets -= 1

    def interrupted(self) -> None:
        again = self.rng.choice([0, 0, self.rng.randrange(1, 40)])
        with contextlib.suppress(KeyboardInterrupt), raised_at(self.rng.randrange(1, 2500), again) as struck:
            try:
                self.any_call()
            finally:
                self.struck += struck

    def any_call(self) -> None:
        self.rng.choice([self.generate, self.beam_search, self.read_stream, self.leave_stream])()

    def threads(self) -> None:
        """Three threads call at once, beside the streams that are open."""
        rngs = [random.Random(self.rng.random()) for _ in range(3)]
        requests = [[Request(rng, self.oracle) for _ in range(3)] for rng in rngs]
        errors: list[BaseException] = []

        def work(mine: list[Request]) -> None:
            try:
                for r in mine:
                    r.check(self.llm.generate(r.prompt, r.params, use_tqdm=False)[0])
            except BaseException as error:
                errors.append(error)

        started = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in requests]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(SECONDS)
        assert not errors and not any(thread.is_alive() for thread in started), errors

    def run(self, num_calls: int) -> None:
        calls: list[Callable[[], None]] = [
            self.generate,
            self.beam_search,
            self.open_stream,
            self.open_stream,
            self.read_stream,
            self.read_stream,
            self.leave_stream,
            self.refused,
            self.poisoned,
            self.failing,
            self.interrupted,
            self.interrupted,
            self.interrupted,
        ]
        for _ in range(num_calls):
            self.rng.choice(calls)()
        if self.rng.random() < 0.2:
            self.threads()
        while self.streams:
            self.read_stream()
        self.generate()
        nothing_is_left(self.llm.engine)


# Where an interrupt strikes while a generator is closed, the interpreter itself drops it and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("chunk", range(NUM_ORDERS // 20))
def test_any_order_of_calls_failures_and_interrupts_is_survived(fake, oracle, monkeypatch, chunk):
    struck = []
    for seed in range(20 * chunk, 20 * chunk + 20):
        rng = random.Random(seed)
        sizes = {"num_pages": rng.choice([40, 60, 200]), "max_decode_steps": rng.choice([0, 1, 4])}
        order = Order(fake.make(LLM, monkeypatch, sizes), oracle, rng)
        try:
            with in_time():
                order.run(12)
        except BaseException as error:
            error.add_note(f"order {seed}; interrupts struck at {order.struck}")
            raise
        struck += order.struck
    assert len(set(struck)) > 10, "interrupts that strike nowhere prove nothing"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_without_recovery_an_interrupt_leaves_an_engine_that_is_wrong_or_stuck(fake, oracle, monkeypatch):
    """The property above can fail."""
    monkeypatch.setattr("jaxllm.entrypoints.exclusive.Exclusive._make_sound", lambda self: None)
    failed = 0
    for seed in range(12):
        order = Order(fake.make(LLM, monkeypatch, {}), oracle, random.Random(seed))
        monkeypatch.setattr("tests.engine.test_survival.SECONDS", 2.0)
        try:
            with in_time():
                for _ in range(6):
                    order.interrupted()
                    order.generate()
                nothing_is_left(order.llm.engine)
        except Exception:
            failed += 1
    assert failed >= 3
