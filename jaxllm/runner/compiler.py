"""The compiled programs of one model: each compiled once, in threads, and at once for whoever waits for it.

A `Key` -> the compiled program, or its future. It needs no weights, so it can begin while they are still being read,
and go on while requests are served: whoever needs a program that is still queued compiles it himself, and passes all
others. Knows nothing of requests, nor of what the programs are called with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from jaxllm.checkpoints import cache_home
from jaxllm.runner.memory_check import out_of_memory_explained
from jaxllm.runner.programs import ALWAYS, START, Key, all_keys, first_keys, lower, soonest_first
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel

log = logging.getLogger(__name__)
_NICE = 10  # of threads that compile beside requests: these come first


class Compiler:
    """Compiles programs, remembers them, and counts those that nobody foresaw.

    Attributes:
        num_compilations: so far.
        num_compilations_after_warmup: of these, after `warm_up`; each is a defect.
    """

    def __init__(self, model: AbstractModel, shapes: RunnerShapes, *, num_threads: int = 2):
        self._model, self._shapes = model, shapes
        self._futures: dict[Key, Future[jax.stages.Compiled]] = {}
        self._begun: set[Key] = set()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
        self._lock = threading.Lock()
        self._warm = False
        self.num_compilations = 0
        self.num_compilations_after_warmup = 0

    def program(self, key: Key) -> jax.stages.Compiled:
        """One compiled program; where it is queued or unknown it is compiled here, before all others."""
        future = self.submit(key)
        if not future.done():
            self._work_on(key, future)
        return future.result()

    def submit(self, key: Key, *, beside_requests: bool = False) -> Future[jax.stages.Compiled]:
        """The future of one program; `beside_requests` its thread leaves the processor to whoever else wants it."""
        with self._lock:
            if (known := self._futures.get(key)) is not None:
                return known
            future = self._futures[key] = Future()
        try:
            self._threads.submit(self._work_on, key, future, beside_requests)
        except RuntimeError:  # the interpreter ends, and no thread takes work any more: the cache is being saved
            self._work_on(key, future)
        return future

    def _work_on(self, key: Key, future: Future[jax.stages.Compiled], beside_requests: bool = False) -> None:
        """Compile a program that nobody has begun with."""
        with self._lock:
            if key in self._begun:
                return
            self._begun.add(key)
        if beside_requests:
            _be_nice()
        try:
            future.set_result(self._compile(key))
        except BaseException as error:
            future.set_exception(error)

    def prepare(self) -> None:
        """Begin to compile what the first short request needs."""
        for key in first_keys(self._shapes):
            self.submit(key)

    def wait_for_first(self) -> None:
        """Until what `prepare` began is there; raises what went wrong."""
        for key in first_keys(self._shapes):
            self.program(key)

    def warm_up(
        self,
        groups: Sequence[str],
        on_compiled: Callable[[int, int], None] | None = None,
        *,
        beside_requests: bool = False,
    ) -> None:
        """Compile what is always needed, and the programs of these groups; afterwards a compilation is a defect.

        `on_compiled` is told how many of how many are done. `beside_requests`: somebody is served meanwhile.
        """
        keys = soonest_first(all_keys(self._shapes, (START, ALWAYS, *groups)))
        futures = [self.submit(key, beside_requests=beside_requests) for key in keys]
        for done, future in enumerate(futures, 1):
            future.result()
            if on_compiled is not None:
                on_compiled(done, len(futures))
        self._warm = True

    def stop(self) -> None:
        """Begin with no other program, so that the process can end; whoever needs one still compiles it himself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

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


def _be_nice() -> None:
    """Give this thread's processor to whoever else wants it; where a system cannot do that for one thread, nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def use_compilation_cache() -> None:
    """Keep compiled programs on disk between processes, unless the user chose a place or none."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values.get("jax_compilation_cache_dir"):
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_home() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
