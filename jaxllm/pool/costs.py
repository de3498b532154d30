"""What schedulers must know of time: measured by a server, modelled by a simulator."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol


class Costs(Protocol):
    """Estimates, in seconds, and one size. They steer, and need not be exact."""

    def prefill_seconds(self, model: str, item: Hashable) -> float:
        """Of one request's prompt."""
        ...

    def step_seconds(self, model: str, num_requests: int) -> float:
        """Of one decode step of so many requests; above 0."""
        ...

    def switch_seconds(self, model: str) -> float:
        """Of bringing a model's weights, and its requests' KV, onto an instance that has another's."""
        ...

    def max_batch(self, model: str) -> int:
        """Requests of a model that decode together."""
        ...
