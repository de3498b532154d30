"""What switches cost: each of the latest, and sums since the start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switch:
    """One model came onto the devices.

    Attributes:
        time: seconds since the epoch.
        model, left: who came; who was on before it.
        seconds: that everybody waited for it.
        num_bytes: of weights.
        copy_seconds: that copying them took; what is not in `seconds` was hidden behind other models' work.
    """

    time: float
    model: str
    left: str | None
    seconds: float
    num_bytes: int
    copy_seconds: float


@dataclass(slots=True)
class SwitchTotals:
    """Sums since the start.

    Attributes:
        count, seconds: switches, and what everybody waited for them.
        num_bytes, copy_seconds, weight_wait_seconds: weights that came to the devices: what copying them took, and how
            much of that was waited for.
        cache_bytes, cache_copy_seconds, cache_wait_seconds: the same of KV pages, to the host and back.
        prefetches, wasted_prefetches: weights fetched before their turn; those of them that were not used.
    """

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    copy_seconds: float = 0.0
    weight_wait_seconds: float = 0.0
    cache_bytes: int = 0
    cache_copy_seconds: float = 0.0
    cache_wait_seconds: float = 0.0
    prefetches: int = 0
    wasted_prefetches: int = 0
