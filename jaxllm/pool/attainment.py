"""SLO attainment: the share of a request's tokens that come in time."""

from __future__ import annotations

from collections.abc import Iterable


def tokens_in_time(arrival: float, times: Iterable[float], *, ttft: float, tpot: float) -> int:
    """How many tokens came by their deadlines.

    The first token's deadline is `arrival + ttft`, every other's `tpot` after the one before; after a miss they count
    anew from when the late token came. Source: Aegaeon, section 2.

    Args:
        arrival: of the request; all times in seconds on one clock.
        times: when each token came, in order.
        ttft, tpot: promised to the first token, and between two.
    """
    count, deadline = 0, arrival + ttft
    for time in times:
        in_time = time <= deadline
        count += in_time
        deadline = (deadline if in_time else time) + tpot
    return count
