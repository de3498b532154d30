"""The clock that a simulation turns by itself. Seconds in, seconds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class VirtualClock:
    """One host's time.

    Attributes:
        now: seconds since the simulation began.
        first: when the first of the tokens came that were read last; the others came after it, until now.
        widest: the longest gap between these.
        ends: when each of them came; empty: all now.
    """

    now: float = 0.0
    first: float = 0.0
    widest: float = 0.0
    ends: Sequence[float] = ()

    def wait_until(self, time: float) -> None:
        """Let time pass; it never runs backwards."""
        self.now = max(self.now, time)
