"""A number that changes in the course of a simulation (requests that wait, say), and its percentiles over time."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class Level:
    """By how much a number that begins at 0 changed, and when; in any order."""

    times: array[float] = field(default_factory=lambda: array("d"))
    changes: array[int] = field(default_factory=lambda: array("i"))

    def change(self, time: float, by: int) -> None:
        """It is so much more from `time` on."""
        if by:
            self.times.append(time)
            self.changes.append(by)

    def weighted(self, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        """Its values between two times, and for how many seconds it had each."""
        times, changes = np.array(self.times), np.array(self.changes, int)
        order = np.argsort(times, kind="stable")
        edges = np.clip(np.concatenate([[start], times[order], [end]]), start, end)
        return np.cumsum(np.concatenate([[0], changes[order]])).astype(float), np.diff(edges)
