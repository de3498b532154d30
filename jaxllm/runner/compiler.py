"""The compiled programs of one model: each compiled once, in threads, for whoever asks first.

A `Key` -> the compiled program, or its future. It needs no weights, so it can begin while they are still being read.
Knows nothing of requests, nor of what the programs are called with.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxllm.kv.page_programs import MOVE_BATCH, MOVES
from jaxllm.runner.memory_check import out_of_memory_explained
from jaxllm.runner.programs import Key, lower
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.loader import AbstractModel

log = logging.getLogger(__name__)


class Compiler:
    """Compiles programs, remembers them, and counts those that nobody foresaw.

    Attributes:
        num_compilations: so far.
        num_compilations_after_warmup: of these, after `warm_up`; each is a defect.
    """

    def __init__(self, model: AbstractModel, shapes: RunnerShapes, *, num_threads: int = 2):
        self._model, self._shapes = model, shapes
        self._futures: dict[Key, Future[Any]] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        self._lock = threading.Lock()
        self._warm = False
        self.num_compilations = 0
        self.num_compilations_after_warmup = 0

    def program(self, key: Key) -> Any:
        """One compiled program; waits where it is not compiled yet."""
        return self.submit(key).result()

    def submit(self, key: Key) -> Future[Any]:
        """The future of one program."""
        with self._lock:
            if key not in self._futures:
                self._futures[key] = self._threads.submit(self._compile, key)
            return self._futures[key]

    def prepare(self) -> None:
        """Begin to compile what the first short request needs."""
        shapes = self._shapes
        self.submit(("admit", 0, True))
        self.submit(("ragged", shapes.token_buckets[0], True))
        for name in shapes.sampling_programs:
            self.submit((name, shapes.row_buckets[0], not shapes.deterministic))

    def warm_up(self, *, sampling: bool, scoring: bool, tiers: bool) -> None:
        """Compile every program that `all_keys` names; afterwards a compilation is a defect."""
        for future in [self.submit(key) for key in all_keys(self._shapes, sampling, scoring, tiers)]:
            future.result()
        self._warm = True

    def _compile(self, key: Key) -> Any:
        started = time.perf_counter()
        with out_of_memory_explained(self._model, self._shapes):
            program = lower(self._model, self._shapes, key).compile()
        seconds = time.perf_counter() - started
        self.num_compilations += 1
        log.debug("compiled %s in %.2f s", key, seconds)
        if self._warm:
            self.num_compilations_after_warmup += 1
            log.warning("compiled %s in %.2f s after warm-up: a defect, please report", key, seconds)
        return program


def all_keys(shapes: RunnerShapes, sampling: bool, scoring: bool, tiers: bool) -> list[Key]:
    """Every program there is; the flags are those of `ModelRunner.warm_up`."""
    keys: list[Key] = [("admit", 0, True), *(("ragged", t, True) for t in shapes.token_buckets)]
    variants = (False,) if shapes.deterministic else (True, False) if sampling else (True,)
    for greedy in variants:
        keys += [(name, r, greedy) for r in shapes.row_buckets for name in shapes.sampling_programs]
    if scoring:
        keys += [(name, t, True) for t in shapes.scoring_buckets for name in ("hidden", "score", "pool")]
    return keys + [(name, MOVE_BATCH, True) for name in (MOVES if tiers else ("copy",))]
