"""What a service promises (its SLO), as text: `ttft:2s,tpot:100ms` -> seconds by metric."""

from __future__ import annotations

import re

SLO_METRICS = ("ttft", "tpot", "itl", "e2e")


def parse_slo(text: str | None) -> dict[str, float]:
    """`"ttft:2s,tpot:50ms"` -> `{"ttft": 2.0, "tpot": 0.05}`. Raises ValueError where it is none."""
    limits: dict[str, float] = {}
    for part in (text or "").split(",") if text else ():
        match = re.fullmatch(r"\s*(\w+)\s*:\s*([\d.]+(?:e-?\d+)?)\s*(ms|s)\s*", part)
        if match is None or match[1] not in SLO_METRICS:
            raise ValueError(f"slo {text!r} is not understood at {part!r}; write ttft:2s,tpot:50ms ({_known()})")
        if match[1] in limits:
            raise ValueError(f"slo {text!r} names {match[1]} twice")
        try:
            limits[match[1]] = float(match[2]) * (1e-3 if match[3] == "ms" else 1.0)
        except ValueError:
            raise ValueError(f"slo {text!r}: {match[2]!r} is no number") from None
        if not limits[match[1]] > 0:
            raise ValueError(f"slo {text!r}: a limit must be above 0")
    return limits


def _known() -> str:
    return ", ".join(SLO_METRICS)
