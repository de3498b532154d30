"""The pool's one thread: carries out the policy's turns, one model's engine at a time.

Everything that touches an engine or the devices happens here, but for loading and fetching, which threads beside it do.
Tasks of models that are ready come in from any thread; updates go out as from an engine's own thread. A model that
fails ends its own requests, and no other's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar, final

from jaxllm.engine.errors import EngineError, Unavailable
from jaxllm.entrypoints.tasks import Task, Tasks, Update
from jaxllm.pool.budget import NoRoom
from jaxllm.pool.model import PooledModel, State
from jaxllm.pool.policies import Policy, Turn
from jaxllm.pool.residence import Residence, Sizes
from jaxllm.pool.residents import Residents

if TYPE_CHECKING:
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.pool.lane import Lane

log = logging.getLogger(__name__)
T = TypeVar("T")
_IDLE_SECONDS = 0.25
_CROWDED_SECONDS = 0.005
_LEAST_STEPS = 4  # of a turn: where switches cost next to nothing quotas do, too, and every turn ends with a wait
_INSTANCE = 0


@final
class Driver:
    """Steps the engines of one instance.

    Args:
        models: of the pool, by name; changed on this thread alone.
        policy: whose turn it is.
        residents: who is on the devices.
        longest: seconds after which a turn's prompts count as prefilled, whatever they are.
    """

    def __init__(self, models: dict[str, PooledModel], policy: Policy, residents: Residents, longest: float):
        self.death: BaseException | None = None
        self.last_progress = time.monotonic()
        self._models, self._policy, self._residents, self._longest = models, policy, residents, longest
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._between_turns: list[Callable[[], None]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    # From any thread.

    def submit(self, model: PooledModel, lane: Lane, task: Task) -> None:
        """Queue a task."""
        self._put(lambda: self._accept(model, lane, task), lambda error: lane.refuse(task, error))

    def cancel(self, model: PooledModel, listener: Any) -> None:
        """End what was started for a listener."""
        self._put(lambda: self._cancel(model, listener))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call something between two turns; what it raises goes to the future and harms nobody."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._put(lambda: self._between_turns.append(run), future.set_exception)
        return future

    def _put(self, command: Callable[[], None], refused: Callable[[Exception], None] = lambda _: None) -> None:
        if not self.is_alive:
            refused(EngineError("the pool was shut down"))
            return
        self._commands.put(command)

    def stop(self, timeout: float = 10.0) -> bool:
        """End the thread; unfinished work ends with an error. False where it is stuck."""
        self._commands.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether it can still do anything."""
        return self.death is None and self._thread.is_alive()

    @property
    def stalled_seconds(self) -> float:
        """How long there has been work and no progress."""
        return time.monotonic() - self.last_progress

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                self._do_between_turns()
                turn = self._policy.next_turn(_INSTANCE)
                if turn is not None:
                    self._carry_out(turn)
        except BaseException as error:
            log.critical("the pool is dead", exc_info=error)
            self.death = error
        finally:
            self.death = self.death or EngineError("the pool was shut down")
            for model in self._models.values():
                self._fail_tasks(model, EngineError("the pool was shut down"))
            self._residents.shutdown()

    def _obey(self, *, wait: bool = True) -> None:
        """Carry out what has come, waiting for it where nothing is to be done."""
        wait = wait and not self._between_turns and not any(model.open for model in self._models.values())
        while True:
            try:
                command = self._commands.get(timeout=_IDLE_SECONDS) if wait else self._commands.get_nowait()
            except queue.Empty:
                if wait:
                    self.last_progress = time.monotonic()
                return
            if wait:
                self.last_progress, wait = time.monotonic(), False
            if command is None:
                self._stopping = True
                return
            command()

    def _do_between_turns(self) -> None:
        actions, self._between_turns = self._between_turns, []
        for action in actions:
            action()
            self.last_progress = time.monotonic()
        self._residents.arrive()
        self._let_go()
        self._expire()

    def _expire(self) -> None:
        """Models that nobody wanted for their `keep_alive` leave the devices."""
        now = time.monotonic()
        for model in self._models.values():
            if model.has_work:
                model.used = now
            elif (
                model.residence is not None
                and not model.entry.pinned
                and now - model.used > model.keep_alive
                and (model.residence.has_weights or model.residence.cache.is_here)
            ):
                log.info("%s leaves the device after %.0f s without requests", model.name, now - model.used)
                self._residents.put_to_sleep(model)

    def _carry_out(self, turn: Turn) -> None:
        model = self._models[turn.model]
        try:
            self._begin(model, turn.starts)
            if not self._bring(model):
                return
            self._step_until_over(model, turn.seconds)
            self._tasks(model).settle()
        except Exception as error:
            self.fail(model, error)
        self.last_progress = time.monotonic()

    def _bring(self, model: PooledModel) -> bool:
        """Put a model on the devices; False where a model that is being loaded stands in the way for now."""
        try:
            self._residents.bring(model, self._policy.upcoming(_INSTANCE))
        except NoRoom:
            if not any(other.state is State.LOADING for other in self._models.values()):
                raise
            self._all_prefilled(model)  # they have a place in the rounds to come
            time.sleep(_CROWDED_SECONDS)
            return False
        return True

    def _begin(self, model: PooledModel, items: Any) -> None:
        for task in items:
            model.prefilling.add(task)
            self._tasks(model).start(task)

    def _step_until_over(self, model: PooledModel, seconds: float) -> None:
        tasks, started, ends = self._tasks(model), time.monotonic(), None
        while not self._stopping:
            self._obey(wait=False)
            self._begin(model, self._policy.joining(_INSTANCE))
            if not tasks.has_work:
                tasks.flush()
                if not tasks.has_work:
                    return
            self._step(model)
            now = time.monotonic()
            if now - started > self._longest:
                self._all_prefilled(model)
            if model.prefilling:
                continue
            ends = ends if ends is not None else now + max(seconds, _LEAST_STEPS * model.measured.step)
            if now >= ends or self._between_turns:
                return
            self._prefetch()

    def _step(self, model: PooledModel) -> None:
        decodes, before = not model.prefilling, time.monotonic()
        steps = self._tokens(model)
        if self._tasks(model).step():
            self.last_progress = now = time.monotonic()
            if decodes and (tokens := self._tokens(model) - steps) > 0:
                model.measured.learn("step", (now - before) / max(1, tokens / max(1, len(model.open))))
        else:
            time.sleep(0.0005)

    def _tokens(self, model: PooledModel) -> int:
        assert model.llm is not None
        return model.llm.engine.accounting.totals.generation_tokens

    def _prefetch(self) -> None:
        self._residents.arrive()
        upcoming = self._policy.upcoming(_INSTANCE)
        for name in upcoming:
            model = self._models[name]
            if model.residence is not None and not (model.residence.has_weights and model.residence.cache.is_here):
                self._residents.prefetch(model, upcoming)
                return

    def _tasks(self, model: PooledModel) -> Tasks:
        assert model.tasks is not None
        return model.tasks

    # Tasks.

    def _accept(self, model: PooledModel, lane: Lane, task: Task) -> None:
        if model.lane is lane and model.state in (State.READY, State.DRAINING):
            model.open[task.listener] = task
            self._policy.add(task, model.name)
        else:
            lane.refuse(task, Unavailable(f"the model {model.name!r} has left; send the request again"))

    def _cancel(self, model: PooledModel, listener: Any) -> None:
        if (task := model.open.get(listener)) is not None:
            self._close(model, task)
        if model.tasks is not None:
            model.tasks.cancel(listener)

    def heard(self, model: PooledModel, updates: list[Update]) -> None:
        """What an engine says of its tasks, before their listeners hear it. On the driver's thread."""
        for update in updates:
            if (task := model.open.get(update.listener)) is None:
                continue
            if update.finished:
                self._close(model, task)
            elif update.delta is not None and update.delta.token_ids:
                self._prefilled(model, task)

    def _prefilled(self, model: PooledModel, task: Task) -> None:
        if task in model.prefilling:
            model.prefilling.discard(task)
            self._policy.prefilled(task)

    def _all_prefilled(self, model: PooledModel) -> None:
        for task in list(model.prefilling):
            self._prefilled(model, task)

    def _close(self, model: PooledModel, task: Task) -> None:
        del model.open[task.listener]
        model.prefilling.discard(task)
        self._policy.end(task)
        model.used = time.monotonic()

    # Models that come and go.

    def reserve(self, model: PooledModel, sizes: Sizes) -> None:
        """Take the bytes of a model that is about to be loaded. Raises NoRoom. On the driver's thread."""
        self._residents.reserve(model, sizes)

    def adopt(self, model: PooledModel, llm: AsyncLLM, lane: Lane, tasks: Tasks, residence: Residence) -> None:
        """A model has been loaded. On the driver's thread."""
        model.llm, model.lane, model.tasks, model.residence = llm, lane, tasks, residence
        model.state, model.stage, model.error, model.used = State.READY, "", None, time.monotonic()
        self._residents.rested(model)

    def fail(self, model: PooledModel, error: Exception) -> None:
        """A model cannot go on: its requests end with an error, its memory is free. On the driver's thread."""
        is_said = isinstance(error, ValueError | NoRoom)
        log.error("the model %s failed: %s", model.name, error, exc_info=None if is_said else error)
        said = error if is_said else EngineError(f"the model failed ({type(error).__name__}); the log says why")
        self._fail_tasks(model, said)
        self._release(model)
        model.state, model.error, model.failed_at = State.FAILED, said, time.monotonic()

    def _release(self, model: PooledModel) -> None:
        self._residents.release(model)
        if model.llm is not None:
            model.llm.shutdown()
        model.residence = model.tasks = model.llm = model.lane = None

    def _fail_tasks(self, model: PooledModel, error: Exception) -> None:
        for task in list(model.open.values()):
            self._close(model, task)
            if model.lane is not None and (model.tasks is None or task.listener not in model.tasks):
                model.lane.refuse(task, error)
        if model.tasks is not None:
            model.tasks.fail_all(error)

    def drain(self, model: PooledModel) -> None:
        """Take no more requests for a model, and let it go when the last has ended. On the driver's thread."""
        model.state = State.DRAINING
        model.removed = model.removed or Future()

    def _let_go(self) -> None:
        for model in [m for m in self._models.values() if m.removed is not None and not m.open]:
            self._release(model)
            del self._models[model.name]
            assert model.removed is not None
            model.removed.set_result(None)

    def with_model(self, model: PooledModel, function: Callable[[], T]) -> T:
        """Call something with a model on the devices, nothing of it on its way. On the driver's thread."""
        if model.state is not State.READY:
            raise Unavailable(f"the model {model.name!r} is {model.state.value}")
        self._residents.bring(model, self._policy.upcoming(_INSTANCE))
        self._tasks(model).settle()
        return function()
