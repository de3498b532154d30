"""Programs are compiled once each, whoever asks, and at once for whoever waits for one."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from jaxllm.entrypoints.warm_up import WarmUp
from jaxllm.runner import compiler as compilers
from jaxllm.runner.programs import ALWAYS, PROGRAMS, SAMPLING, SCORING, START, all_keys, first_keys, soonest_first
from tests.helpers.patience import patience

SHAPES = SimpleNamespace(
    token_buckets=(64, 128),
    row_buckets=(1, 4, 8),
    scoring_buckets=(64, 128),
    separate_greedy=True,
    max_decode_steps=4,
    max_loras=0,
    speculates=lambda bucket: False,
)


class Compilations:
    """In place of XLA: says what was compiled in which order, and waits where it is told to."""

    def __init__(self):
        self.order, self.gate, self.failing = [], threading.Event(), ()

    def lower(self, model, shapes, key):
        return SimpleNamespace(compile=lambda: self._compile(key))

    def _compile(self, key):
        if threading.current_thread().name.startswith("compile"):
            self.gate.wait(patience(20))
        if key in self.failing:
            raise ValueError("does not fit")
        self.order.append(key)
        return f"program {key}"


@pytest.fixture
def compilations(monkeypatch):
    made = Compilations()
    monkeypatch.setattr(compilers, "lower", made.lower)
    return made


def engine_with(compiler):
    runner = SimpleNamespace(compiler=compiler, is_alone=True)

    def warm_up(*, scoring, **how):
        compiler.warm_up((SAMPLING, SCORING), **how)

    return SimpleNamespace(runners=[runner], warm_up=warm_up)


def test_whoever_needs_a_queued_program_compiles_it_before_all_others(compilations):
    compiler = compilers.Compiler(None, SHAPES, num_threads=1)
    keys = all_keys(SHAPES, (START, ALWAYS, SAMPLING))
    futures = [compiler.submit(key, beside_requests=True) for key in keys]
    assert compiler.program(keys[-1]) == f"program {keys[-1]}"
    assert compilations.order == [keys[-1]]
    compilations.gate.set()
    assert [future.result(patience(20)) for future in futures] == [f"program {key}" for key in keys]
    assert sorted(compilations.order) == sorted(keys) and compiler.num_compilations == len(keys)


def test_the_order_of_a_warm_up_is_that_of_requests_that_come_alone():
    keys = soonest_first(all_keys(SHAPES, (START, ALWAYS, SAMPLING, SCORING)))
    assert sorted(keys) == sorted(all_keys(SHAPES, (START, ALWAYS, SAMPLING, SCORING)))
    alone = next(i for i, key in enumerate(keys) if key == ("decode_greedy", 4))
    assert {*first_keys(SHAPES), ("sample", 1), ("decode", 1)} <= {*keys[:alone]}
    scoring = [PROGRAMS[name].warm_up == SCORING for name, _ in keys]
    assert scoring == sorted(scoring) and any(scoring)


def test_a_warm_up_beside_requests_is_over_when_all_is_there_and_a_compilation_afterwards_is_a_defect(compilations):
    over, failed = threading.Event(), []
    compiler = compilers.Compiler(None, SHAPES)
    warm_up = WarmUp(engine_with(compiler), over.set, failed.append)
    compilations.gate.set()
    compiler.prepare()
    warm_up.first(lambda done, total: None)
    compilations.gate.clear()
    assert {*compilations.order} == {*first_keys(SHAPES)}, "the first set alone is waited for"
    warm_up.start()
    assert not warm_up.is_over
    compilations.gate.set()
    assert over.wait(patience(20)) and warm_up.is_over and not failed
    assert warm_up.done == warm_up.total == len(all_keys(SHAPES, (START, ALWAYS, SAMPLING, SCORING)))
    assert compiler.num_compilations_after_warmup == 0
    compiler.program(("ragged", 7))
    assert compiler.num_compilations_after_warmup == 1


def test_a_warm_up_that_fails_says_so_and_one_that_is_stopped_ends(compilations):
    compilations.failing = [("decode", 8)]
    compilations.gate.set()
    told = threading.Event()
    compiler = compilers.Compiler(None, SHAPES)
    warm_up = WarmUp(engine_with(compiler), lambda: None, lambda error: told.set())
    warm_up.start()
    assert told.wait(patience(20)) and not warm_up.is_over
    warm_up.stop()
    assert compiler.program(("copy", 3)) == "program ('copy', 3)", "whoever saves the cache may still need one"
