"""What a server says on standard error while it starts: each stage once, and a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, final

_SHARES = 4  # without a terminal: a line each quarter


@final
class Startup:
    """Says what is being done, there and to whoever asks the server for its health.

    Args:
        on_stage: told each stage.
    """

    def __init__(self, on_stage: Callable[[str], None]):
        self._on_stage = on_stage
        self._started = time.perf_counter()
        self._bar: Any = None

    def stage(self, text: str) -> None:
        """Another stage begins."""
        self._on_stage(text)
        self.say(text)

    def compiled(self, done: int, total: int) -> None:
        """So many programs are compiled."""
        self._on_stage(f"compiling {done} of {total}")
        if sys.stderr.isatty():
            self._show(done, total)
        elif done == total or done * _SHARES // total > (done - 1) * _SHARES // total:
            self.say(f"compiled {done} of {total} programs")

    def ready(self, text: str) -> None:
        """The server takes requests."""
        self.say(f"ready in {time.perf_counter() - self._started:.1f} s")
        self.say(text)

    def say(self, text: str) -> None:
        """One line."""
        print(f"jaxllm: {text}", file=sys.stderr, flush=True)

    def _show(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(total=total, desc="jaxllm: compiling", unit="program", file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
