"""The part of a batch in which every stream decodes: nobody's prompt is computed and nobody has ended."""

from __future__ import annotations

from collections.abc import Sequence


def decode_phase(streams: Sequence[Sequence[float]]) -> float | None:
    """Seconds per token of each stream there; None where no token came in that time.

    Args:
        streams: when the tokens of each request came, in seconds of one clock, first to last.
    """
    begun, ends = max(times[0] for times in streams), min(times[-1] for times in streams)
    count = sum(begun < at <= ends for times in streams for at in times)
    return (ends - begun) * len(streams) / count if count else None
