"""Ctrl-C that is never lost: Python drops what is raised in a garbage collection callback, so it is also remembered."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 130
_interrupted = threading.Event()
_waits: Callable[[], bool] = lambda: False


@contextlib.contextmanager
def counted_interrupts() -> Iterator[None]:
    """Remember Ctrl-C beside raising it: Python drops what is raised in a garbage collection callback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: Any) -> None:
        is_first = not _interrupted.is_set()
        _interrupted.set()
        if not (is_first and _waits()):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()
        raise_between_steps(lambda: False)


def raise_between_steps(is_stepping: Callable[[], bool]) -> None:
    """While this is true of the main thread the first Ctrl-C is only remembered, for `raise_if_interrupted`.

    An engine that is cut off inside a step has to forget what it has cached; a second Ctrl-C does that.
    """
    global _waits
    _waits = is_stepping


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that got lost, if one did."""
    if _interrupted.is_set():
        _interrupted.clear()
        raise KeyboardInterrupt


def forget_interrupt() -> None:
    """The interrupt has been dealt with."""
    _interrupted.clear()
