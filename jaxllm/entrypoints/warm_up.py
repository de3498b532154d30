"""The warm-up of an engine that is to take requests soon: what the first needs comes before them, the rest beside them.

A request that needs a program which is not there yet compiles that one, on the engine's thread, and waits for no
other. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine

log = logging.getLogger(__name__)


@final
class WarmUp:
    """Compiles all programs of one engine.

    Args:
        engine: whose.
        on_over: called once, when all are there: on the thread that compiled the last.
        on_failed: called instead with what went wrong.

    Attributes:
        is_over: whether every program is there.
        done, total: programs, of those that are compiled beside requests.
    """

    def __init__(self, engine: Engine, on_over: Callable[[], None], on_failed: Callable[[Exception], None]):
        self.is_over = False
        self.done = self.total = 0
        self._engine, self._on_over, self._on_failed = engine, on_over, on_failed
        self._started = time.perf_counter()

    def first(self, on_compiled: Callable[[int, int], None]) -> None:
        """Wait for what the first request needs; where other processes follow this one, for everything.

        Those do what they are told in order, so they could not compile and follow at the same time.
        """
        if all(runner.is_alone for runner in self._engine.runners):
            for runner in self._engine.runners:
                runner.compiler.wait_for_first()
        else:
            self._engine.warm_up(scoring=True, on_compiled=on_compiled)
            self._end()

    def start(self) -> None:
        """Compile the rest on a thread beside the engine's."""
        if not self.is_over:
            threading.Thread(target=self._run, name="warm-up", daemon=True).start()

    def stop(self) -> None:
        """Begin with no other program: the process shall end."""
        for runner in self._engine.runners:
            runner.compiler.stop()

    def _run(self) -> None:
        try:
            self._engine.warm_up(scoring=True, on_compiled=self._count, beside_requests=True)
        except Exception as error:
            self._on_failed(error)
        else:
            self._end()

    def _count(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def _end(self) -> None:
        self.is_over = True
        seconds = time.perf_counter() - self._started
        log.info("warm-up is over after %.1f s: nothing is compiled from now on", seconds)
        self._on_over()
