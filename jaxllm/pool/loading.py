"""Loads models beside the pool's work: one at a time, in a thread, within the budget.

A `PooledModel` -> a future of its frontend. Models whose programs are the same share them.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, final

import jax

from jaxllm.engine.build import BuiltEngine, build_engine, read_parameters
from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import Unavailable
from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.entrypoints.tasks import Tasks, Update
from jaxllm.kv.page_programs import MOVE_BATCH
from jaxllm.pool.driver import Driver
from jaxllm.pool.host_kv import HostKV
from jaxllm.pool.lane import Lane
from jaxllm.pool.model import PooledModel, State
from jaxllm.pool.residence import Residence, Sizes
from jaxllm.pool.weights import Store
from jaxllm.runner.compiler import Compiler
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.weights.abstract import AbstractModel

_AGAIN_SECONDS = 5.0  # after which a model that failed is tried again
_KEPT_PROGRAMS = 32  # sets of them, of models that may be gone by now


@final
class Loader:
    """Builds engines for a driver.

    Args:
        driver: takes the models that are ready.
        store, host_kv: of all models.
        warm_up: whether to compile everything before a model is ready.
        options: further arguments of `AsyncLLM`.
    """

    def __init__(self, driver: Driver, store: Store, host_kv: HostKV, *, warm_up: bool, **options: Any):
        self._driver, self._store, self._host_kv = driver, store, host_kv
        self._warm_up, self._options = warm_up, options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._lock = threading.Lock()
        self._programs: deque[tuple[AbstractModel, RunnerShapes, Compiler]] = deque(maxlen=_KEPT_PROGRAMS)

    def ensure(self, model: PooledModel) -> Future[AsyncLLM]:
        """A model's frontend, loading it where that was not begun. From any thread.

        The future raises ValueError where its files or settings are wrong, NoRoom where it does not fit.
        """
        with self._lock:
            if model.state is State.DRAINING:
                raise Unavailable(f"the model {model.name!r} is being undeployed")
            is_stale = model.state is State.FAILED and time.monotonic() - model.failed_at > _AGAIN_SECONDS
            if model.loaded is None or is_stale:
                model.state, model.stage, model.error = State.LOADING, "waiting", None
                model.loading_since = time.monotonic()
                model.loaded = self._thread.submit(self._load, model)
            elif model.state is State.FAILED and model.error is not None:
                failed: Future[AsyncLLM] = Future()
                failed.set_exception(model.error)
                return failed
            return model.loaded

    def read(self, model: PooledModel, path: str) -> Future[Any]:
        """Parameters from another place, for a model that is loaded; on the loader's thread."""
        assert model.llm is not None
        built, config = self._built(model.llm), dataclasses.replace(model.config, model=path)
        return self._thread.submit(read_parameters, config, built)

    def shutdown(self) -> None:
        """Load nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _built(self, llm: AsyncLLM) -> BuiltEngine:
        return BuiltEngine(llm.engine, None, llm.model_config, {})

    def _load(self, model: PooledModel) -> AsyncLLM:
        try:
            started = time.perf_counter()
            llm = self._make(model)
            model.measured.learn("load", time.perf_counter() - started)
            return llm
        except Exception as error:
            failure = error
            self._driver.call(lambda: self._driver.fail(model, failure)).result()
            raise

    def _make(self, model: PooledModel) -> AsyncLLM:
        def on_sized(abstract: AbstractModel, shapes: RunnerShapes) -> Compiler:
            sizes = Sizes.of(abstract, shapes)
            self._stage(model, "waiting for room on the device")
            self._driver.call(lambda: self._driver.reserve(model, sizes)).result()
            return self._compiler(abstract, shapes)

        say: Callable[[str], None] = lambda stage: self._stage(model, stage)
        built = build_engine(model.config, progress=False, on_stage=say, on_sized=on_sized)
        reread = BuiltEngine(built.engine, None, built.model_config, {})
        residence = Residence(built.engine, self._store, self._host_kv, lambda: read_parameters(model.config, reread))
        try:
            return self._finish(model, built, residence)
        except BaseException:
            residence.forget()
            raise

    def _finish(self, model: PooledModel, built: BuiltEngine, residence: Residence) -> AsyncLLM:
        """Everything after the engine itself."""
        residence.rest()
        for program in ("take", "put"):
            built.engine.runner.compiler.program((program, MOVE_BATCH))
        if self._warm_up:
            self._stage(model, "compiling")
            built.engine.runner.warm_up(scoring=True, tiers=True)
        made: list[tuple[Lane, Tasks]] = []

        def make_lane(jobs: Jobs, publish: Callable[[list[Update]], None], before_step: Any) -> Lane:
            lane = Lane(self._driver, model, publish)
            made.append((lane, Tasks(jobs, lane.heard, before_step)))
            return lane

        fields = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
        llm = AsyncLLM(built=built, use_tqdm=False, make_thread=make_lane, **self._options, **fields)
        for name, path in model.entry.lora_modules.items():
            llm.adapters.load(name, path)
        ((lane, tasks),) = made
        self._driver.call(lambda: self._driver.adopt(model, llm, lane, tasks, residence)).result()
        return llm

    def _stage(self, model: PooledModel, stage: str) -> None:
        model.stage = stage

    def _compiler(self, model: AbstractModel, shapes: RunnerShapes) -> Compiler:
        """That of a model with the same programs, if there is one."""
        for other, sizes, compiler in self._programs:
            if sizes == shapes and _same_programs(model, other):
                return compiler
        compiler = Compiler(model, shapes)
        self._programs.append((model, shapes, compiler))
        return compiler


def _same_programs(a: AbstractModel | None, b: AbstractModel | None) -> bool:
    if a is None or b is None:
        return a is b

    def described(model: AbstractModel) -> Any:
        leaves, structure = jax.tree.flatten(model.parameters)
        return structure, [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves]

    same = (a.cfg, a.placement, a.graph) == (b.cfg, b.placement, b.graph) and described(a) == described(b)
    return same and _same_programs(a.draft, b.draft)
