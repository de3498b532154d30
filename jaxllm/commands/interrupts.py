"""Ctrl-C that is never lost: Python drops what is raised in a garbage collection callback, so it is also remembered."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT_CODE = 130
_interrupted = threading.Event()


@contextlib.contextmanager
def counted_interrupts() -> Iterator[None]:
    """Remember Ctrl-C beside raising it: Python drops what is raised in a garbage collection callback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(signum: int, frame: Any) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupted.clear()


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt that got lost, if one did."""
    if _interrupted.is_set():
        _interrupted.clear()
        raise KeyboardInterrupt


def forget_interrupt() -> None:
    """The interrupt has been dealt with."""
    _interrupted.clear()
