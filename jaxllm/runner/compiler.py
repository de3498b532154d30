"""The compiled programs of one model: each compiled once, in threads, for whoever asks first.

A `Key` -> the compiled program, or its future. It needs no weights, so it can begin while they are still being read.
Knows nothing of requests, nor of what the programs are called with.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from jaxllm.checkpoints import cache_home
from jaxllm.runner.memory_check import out_of_memory_explained
from jaxllm.runner.programs import ALWAYS, START, Key, all_keys, first_keys, lower
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel

log = logging.getLogger(__name__)


class Compiler:
    """Compiles programs, remembers them, and counts those that nobody foresaw.

    Attributes:
        num_compilations: so far.
        num_compilations_after_warmup: of these, after `warm_up`; each is a defect.
    """

    def __init__(self, model: AbstractModel, shapes: RunnerShapes, *, num_threads: int = 2):
        self._model, self._shapes = model, shapes
        self._futures: dict[Key, Future[jax.stages.Compiled]] = {}
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        self._lock = threading.Lock()
        self._warm = False
        self.num_compilations = 0
        self.num_compilations_after_warmup = 0

    def program(self, key: Key) -> jax.stages.Compiled:
        """One compiled program; waits where it is not compiled yet."""
        return self.submit(key).result()

    def submit(self, key: Key) -> Future[jax.stages.Compiled]:
        """The future of one program."""
        with self._lock:
            if key not in self._futures:
                self._futures[key] = self._start(key)
            return self._futures[key]

    def _start(self, key: Key) -> Future[jax.stages.Compiled]:
        try:
            return self._threads.submit(self._compile, key)
        except RuntimeError:  # the interpreter ends, and no thread takes work any more: the cache is being saved
            future: Future[jax.stages.Compiled] = Future()
            future.set_result(self._compile(key))
            return future

    def prepare(self) -> None:
        """Begin to compile what the first short request needs."""
        for key in first_keys(self._shapes):
            self.submit(key)

    def warm_up(self, groups: Sequence[str], on_compiled: Callable[[int, int], None] | None = None) -> None:
        """Compile what is always needed, and the programs of these groups; afterwards a compilation is a defect.

        `on_compiled` is told how many of how many are done.
        """
        futures = [self.submit(key) for key in all_keys(self._shapes, (START, ALWAYS, *groups))]
        for done, future in enumerate(futures, 1):
            future.result()
            if on_compiled is not None:
                on_compiled(done, len(futures))
        self._warm = True

    def _compile(self, key: Key) -> jax.stages.Compiled:
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


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between processes, unless the user chose a place or none."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values.get("jax_compilation_cache_dir"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
