"""How long a test waits: what suffices on an idle machine, times how much slower this one is now."""

from __future__ import annotations

import time
from functools import cache

_USUAL = 0.03  # seconds that the loop below takes on an idle machine of the usual kind


@cache
def slowness() -> float:
    """How many times slower than usual plain Python runs here; at least 1."""
    started = time.perf_counter()
    total = 0
    for i in range(400_000):
        total += i
    return max(1.0, (time.perf_counter() - started) / _USUAL)


def patience(seconds: float) -> float:
    """A limit that only a hang exceeds; twice the usual one, since another test may run beside this."""
    return 2 * seconds * slowness()
