"""`Pool`: many models on one device, for scripts and for the server.

Names -> models; calls go to the model's frontend, whose work waits for its turn on the device. Any thread may call.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self

from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.errors import EngineError, Unavailable
from jaxllm.engine.outputs import RequestOutput
from jaxllm.engine.prompts import Prompt, as_prompts
from jaxllm.engine.work import Work
from jaxllm.pool.budget import Budget
from jaxllm.pool.config import ModelEntry, PoolConfig, check_names, read_models, seconds
from jaxllm.pool.lane import Waiter
from jaxllm.pool.model import MeasuredCosts, PooledModel, State
from jaxllm.pool.policies import make_policy
from jaxllm.pool.quotas import LONGEST_SECONDS

if TYPE_CHECKING:
    from jaxllm.decoding.beam_search import BeamSearchOutput, BeamSearchParams
    from jaxllm.entrypoints.async_llm import AsyncLLM

_POLL_SECONDS = 0.2  # between looks for Ctrl-C
_LEFT_BYTES = 1 << 30  # on an accelerator, for what programs need beside weights and cache


class UnknownModel(ValueError):
    """No model of the pool has this name."""


class Pool:
    """Models that share one device, switched between tokens.

    Args:
        models: name -> path, or a table with `path` and the fields of `ModelEntry` and `EngineConfig`; or what
            `--models` takes.
        warm_up: compile everything of a model before it is ready.
        options: further arguments of every model's `AsyncLLM`.
        **kwargs: the fields of `PoolConfig`, and those of `EngineConfig` for every model that does not say otherwise.

    Raises:
        ValueError: in one line, what cannot be.
    """

    def __init__(
        self,
        models: Mapping[str, Any] | Sequence[str],
        *,
        warm_up: bool = False,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        shared = {f.name for f in dataclasses.fields(PoolConfig)}
        self._defaults = {name: value for name, value in kwargs.items() if name not in shared}
        settings, entries = read_models(models, self._defaults)
        self.config = PoolConfig(**(settings | {name: value for name, value in kwargs.items() if name in shared}))
        self._models: dict[str, PooledModel] = {}
        self._start(warm_up, dict(options or {}))
        for entry in entries:
            self._add(entry)
        for model in sorted(self._models.values(), key=lambda model: not model.entry.pinned):
            if self.config.preload == "all" or (self.config.preload == "pinned" and model.entry.pinned):
                self._loader.ensure(model)

    def _start(self, warm_up: bool, options: dict[str, Any]) -> None:
        import jax

        from jaxllm.pool.driver import Driver
        from jaxllm.pool.host_kv import HostKV
        from jaxllm.pool.loading import Loader
        from jaxllm.pool.residents import Residents
        from jaxllm.pool.weights import make_store
        from jaxllm.runner.memory_check import free_host_bytes

        config, device = self.config, jax.local_devices()[0]
        self._is_cpu = device.platform == "cpu"
        self._limit = config.device_memory_bytes or _device_limit(device)
        if self._is_cpu and (free := free_host_bytes()) is not None and self._limit > free:
            raise ValueError(f"device_memory_bytes={self._limit}, but this machine has {free} bytes free; lower it")
        store = make_store(device, self._limit)
        self.host_kv = HostKV(config.sleeping_kv_bytes, config.slab_bytes)
        self.residents = Residents(self._models, Budget(self._limit), config.host_memory_bytes)
        policy = make_policy(config.policy, MeasuredCosts(self._models), tbt=config.tpot)
        self.driver = Driver(self._models, policy, self.residents, LONGEST_SECONDS)
        self.driver.start()
        self._loader = Loader(self.driver, store, self.host_kv, warm_up=warm_up, **options)

    def _add(self, entry: ModelEntry) -> PooledModel:
        config = entry.engine_config()
        if config.kv_cache_memory_bytes is None and not self._is_cpu:
            config = dataclasses.replace(config, kv_cache_memory_bytes=self._limit // 4)
        wanted = self.config.keep_alive if entry.keep_alive is None else entry.keep_alive
        model = PooledModel(entry, config, keep_alive=math.inf if entry.pinned else seconds(wanted))
        self._models[entry.name] = model
        return model

    # Models.

    @property
    def models(self) -> list[PooledModel]:
        """All of them, in the order in which they came."""
        return list(self._models.values())

    def model(self, name: str) -> PooledModel:
        """The model of a name, an alias or an adapter. Raises UnknownModel."""
        for model in self.models:
            if name in model.entry.names:
                return model
        known = ", ".join(repr(model.name) for model in self.models)
        raise UnknownModel(f"the pool has no model {name[:100]!r}; it has {known}")

    def ready(self, name: str) -> Future[AsyncLLM]:
        """The future of a model's frontend; it is loaded where nobody has asked for it yet."""
        return self._loader.ensure(self.model(name))

    def llm(self, name: str) -> AsyncLLM:
        """A model's frontend, when it is ready."""
        return _result(self.ready(name))

    def deploy(self, name: str, path: str | Mapping[str, Any], *, load: bool = True) -> PooledModel:
        """Add a model, and begin to load it. Raises ValueError where the name is taken or the table is wrong."""
        entry = ModelEntry.of(name, path, self._defaults)
        check_names([*(model.entry for model in self.models), entry])
        model = self.driver.call(lambda: self._add(entry)).result()
        if load:
            self._loader.ensure(model)
        return model

    def undeploy(self, name: str) -> Future[None]:
        """Take no more requests for a model; the future is done when its last has ended and its memory is free."""
        model = self.model(name)
        if model.loaded is not None and not model.loaded.done():
            raise Unavailable(f"the model {model.name!r} is loading; undeploy it when it is there")
        self.driver.call(lambda: self.driver.drain(model)).result()
        assert model.removed is not None
        return model.removed

    def sleep(self, name: str, level: int = 1) -> None:
        """Bring a model off the device, its requests too; its next turn brings it back. Pinned ones as well.

        With `level=2` its weights leave the host, too, and are read again from disk.
        """
        model = self.model(name)

        def put_to_sleep() -> None:
            if model.state is State.READY and model.residence is not None:
                self.residents.put_to_sleep(model)
                if level == 2:
                    model.residence.forget_rest()

        self.driver.call(put_to_sleep).result()

    def wake_up(self, name: str) -> None:
        """Bring a model onto the device. Raises NoRoom."""
        model = self.model(name)
        _result(self.ready(name))
        self.driver.call(lambda: self.driver.with_model(model, lambda: None)).result()

    def is_sleeping(self, name: str) -> bool:
        """Whether a model is off the device."""
        return self.model(name).place != "device"

    def keep_alive(self, name: str, duration: Any) -> None:
        """How long a model stays on the device after its last request, from now on; see `seconds`."""
        self.model(name).keep_alive = seconds(duration)

    def update_weights(self, name: str, path: str) -> None:
        """Replace a model's weights by others of the same shapes: nothing is compiled, cached prefixes are forgotten.

        Requests under way go on with the new weights, from the tokens they have.
        """
        model = self.model(name)
        _result(self.ready(name))
        params = _result(self._loader.read(model, path))

        def replace() -> None:
            assert model.residence is not None
            model.residence.replace_weights(params)
            model.config = dataclasses.replace(model.config, model=path)

        self.driver.call(lambda: self.driver.with_model(model, replace)).result()

    # Work.

    def generate(
        self,
        model: str,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt with one model, or an adapter of one; see `LLM.generate`."""
        llm, given = self.llm(model), as_prompts(prompts)
        adapter = llm.adapter_of(model if model in self.model(model).entry.lora_modules else None)
        params = sampling_params or llm.get_default_sampling_params()
        each = list(params) if isinstance(params, Sequence) else [params] * len(given)
        if len(each) != len(given):
            raise ValueError(f"{len(each)} sampling_params for {len(given)} prompts; give one, or one for each")
        jobs = [llm.jobs.prepare(prompt, one, adapter=adapter) for prompt, one in zip(given, each, strict=True)]
        for text in dict.fromkeys(text for job in jobs for text in job.output.warnings):
            warnings.warn(text, stacklevel=2)
        self._run(llm, jobs)
        return [job.output for job in jobs]

    def chat(
        self, model: str, messages: Sequence[Any], sampling_params: SamplingParams | None = None, **kwargs: Any
    ) -> list[RequestOutput]:
        """Answer one conversation or several; `kwargs` as for `LLM.chat`."""
        conversations = [messages] if not messages or isinstance(messages[0], Mapping) else messages
        prompts = [self.llm(model).chat_prompt(conversation, **kwargs) for conversation in conversations]
        return self.generate(model, prompts, sampling_params)

    def beam_search(
        self, model: str, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt; see `LLM.beam_search`."""
        from jaxllm.decoding.beam_search import BeamSearch

        llm = self.llm(model)
        searches = [BeamSearch.of(llm.jobs, prompt, params) for prompt in as_prompts(prompts)]
        self._run(llm, searches)
        return [search.result() for search in searches]

    def _run(self, llm: AsyncLLM, works: Sequence[Work]) -> None:
        """Submit work and wait; whatever ends the wait takes back what is unfinished."""
        waiters = [Waiter() for _ in works]
        try:
            for work, waiter in zip(works, waiters, strict=True):
                llm.thread.submit(work, waiter)
            for waiter in waiters:
                while not waiter.finished.wait(_POLL_SECONDS):
                    if not self.driver.is_alive:
                        raise EngineError("the pool was shut down")
        finally:
            for waiter in waiters:
                if not waiter.finished.is_set():
                    llm.thread.cancel(waiter)
        for waiter in waiters:
            if isinstance(waiter.error, EngineError | Unavailable):
                raise waiter.error

    def close(self) -> None:
        """End everything; unfinished work ends with an error."""
        self._loader.shutdown()
        self.driver.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _result(future: Future[Any]) -> Any:
    """Wait so that Ctrl-C comes through."""
    while True:
        try:
            return future.result(timeout=_POLL_SECONDS)
        except TimeoutError:
            if future.done():
                raise


def _device_limit(device: Any) -> int:
    """Bytes of each device that models may take, where nobody says it."""
    if device.platform == "cpu":
        from jaxllm.runner.memory_check import free_host_bytes

        return (free_host_bytes() or 4 << 30) // 2
    stats = device.memory_stats() or {}
    free = int(stats.get("bytes_limit", 8 << 30) * EngineConfig().gpu_memory_utilization) - stats.get("bytes_in_use", 0)
    return max(1, free - _LEFT_BYTES)
