"""How many tokens an iteration may take while somebody reads along: no more than pass in the time between two tokens.

A prompt's chunk makes all who decode in the same iteration wait for their next token (Sarathi-Serve, Agrawal et al.
2024, sizes chunks by a profile made beforehand; here they follow what iterations took). An iteration costs what its
bucket costs, full or not, so what is chosen is a bucket. Plain Python; knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

DEFAULT_SECONDS = 0.1  # faster than anybody reads
_LEAST_PREFILL = 16  # tokens: a prompt goes on whatever its iterations take
_WEIGHT = 0.25  # of the latest iteration in a bucket's mean


@final
class Pace:
    """Learns what iterations of each size take, and says how large the next may be.

    Args:
        sizes: the buckets of tokens, smallest first.
        target: seconds that an iteration with decodes in it may take; None: as long as it wants.
    """

    def __init__(self, sizes: Sequence[int], target: float | None = None):
        self.target = target
        self._sizes = tuple(sizes)
        self._seconds: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """An iteration of so many tokens took so long.

        What makes one size slower or faster (longer contexts, other work on the machine) does so to all: a size that
        was given up would else never be tried again.
        """
        size = next((size for size in self._sizes if num_tokens <= size), self._sizes[-1])
        known = self._seconds.setdefault(size, seconds)
        change = (known + _WEIGHT * (seconds - known)) / known if known > 0 else 1.0
        self._seconds = {size: seconds * change for size, seconds in self._seconds.items()}

    def most(self, num_decodes: int) -> int:
        """Tokens of an iteration in which so many requests decode, these included.

        The largest size that is expected to keep to the target; at least one with some room for a prompt.
        """
        roomy = [size for size in self._sizes if size >= num_decodes + _LEAST_PREFILL] or [self._sizes[-1]]
        if self.target is None:
            return roomy[-1]
        return max((size for size in roomy if self.expected(size) <= self.target), default=roomy[0])

    def expected(self, size: int) -> float:
        """Seconds that an iteration of a bucket takes; of one that never ran in proportion to the next that did."""
        if not self._seconds:
            return 0.0
        nearest = min(self._seconds, key=lambda known: (abs(known - size), known))
        return self._seconds[nearest] * (1.0 if nearest == size else size / nearest)
