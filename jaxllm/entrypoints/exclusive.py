"""One engine for callers on any thread who may be interrupted at any point.

Every change of the engine happens under a lock and in one piece. What an exception cut off is set right by whoever
comes next, before anything else; what an ended call left behind is taken back. Knows nothing of prompts or text.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar, final

from jaxllm.engine.completions import Jobs
from jaxllm.engine.errors import EngineError
from jaxllm.engine.work import Work

log = logging.getLogger(__name__)
T = TypeVar("T")


@final
class Call:
    """What one public call has started. When it is closed, or nobody has it any more, its work is taken back."""

    __slots__ = ("__weakref__", "closed", "works")

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.closed = False


@final
class Exclusive:
    """Access to one engine."""

    def __init__(self, jobs: Jobs):
        self._jobs, self._engine = jobs, jobs.engine
        self._lock = threading.RLock()
        self._calls: dict[int, tuple[weakref.ref[Call], list[Work]]] = {}
        self._numbers = itertools.count()

    def open(self) -> Call:
        """A call, to which everything belongs that is started for it."""
        call = Call()
        self._calls[next(self._numbers)] = weakref.ref(call), call.works
        return call

    def close(self, call: Call) -> None:
        """End a call: unfinished work of it is aborted, now or, where that is impossible now, before the next step."""
        call.closed = True
        if self._lock._is_owned():  # type: ignore[attr-defined]  # the garbage collector came in the middle of a step
            return
        try:
            self.run(lambda: None)
        except EngineError as error:
            log.error("the engine is dead", exc_info=error)

    @property
    def is_shared(self) -> bool:
        """Whether several calls are under way."""
        return len(self._calls) > 1

    @property
    def is_inside(self) -> bool:
        """Whether this thread is changing the engine now."""
        return self._lock._is_owned()  # type: ignore[attr-defined]

    def run(self, function: Callable[[], T]) -> T:
        """Call `function`, alone, on a sound engine.

        The lock is taken by a plain `with` on a lock made in C: between having it and being sure to give it back there
        is no point at which an interrupt could come.

        Raises:
            EngineError: the engine is dead.
        """
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise EngineError("the engine was called from inside one of its own steps")
        with self._lock:
            self._make_sound()
            for number, (call, works) in list(self._calls.items()):
                if (open_call := call()) is None or open_call.closed:
                    for work in works:
                        work.abort()
                    del self._calls[number]
            return function()

    def run_last(self, function: Callable[[], None], seconds: float) -> None:
        """Call `function`, alone, on an engine that may be unsound; not at all where a step outlasts `seconds`."""
        if self._lock._is_owned() or not self._lock.acquire(timeout=seconds):  # type: ignore[attr-defined]
            log.warning("the engine is busy: its KV cache is not saved")
            return
        try:
            function()
        finally:
            self._lock.release()

    def _make_sound(self) -> None:
        if self._engine.is_sound:
            return
        try:
            self._jobs.recover()
        except Exception as error:
            raise EngineError(f"the engine is dead: {type(error).__name__}: {error}; make a new one") from error
