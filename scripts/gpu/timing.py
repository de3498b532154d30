"""Seconds of a call on the device, and what they are of a point's work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any


def best_seconds(step: Callable[[Any], Any], value: Any, runs: int = 5, chain: int = 10) -> float:
    """Least seconds of one call, over several chains of calls, each fed what the one before gave."""
    best = math.inf
    for _ in range(runs + 1):  # the first compiles
        started = time.perf_counter()
        for _ in range(chain):
            value = step(value)
        value.block_until_ready()
        best = min(best, (time.perf_counter() - started) / chain)
    return best


def repeated(attend: Callable[[Any, Any], Any], interpret: bool) -> Callable[[Any, Any], Any]:
    """A chain of calls in one program, so that launching does not count. The last argument says how many."""
    import jax

    count = 2 if interpret else 20
    chain = jax.jit(lambda q, pages: jax.lax.fori_loop(0, count, lambda _, x: attend(x, pages), q))
    chain.count = count  # type: ignore[attr-defined]
    return chain


def measured(point: dict[str, Any], run: Any, args: tuple[Any, ...], **work: float) -> dict[str, Any]:
    """A point with its time and rates; a failure is a result too."""
    try:
        run(*args).block_until_ready()
        best = math.inf
        for _ in range(3):
            started = time.perf_counter()
            run(*args).block_until_ready()
            best = min(best, (time.perf_counter() - started) / run.count)
    except Exception as error:  # one tile size that does not fit must not end the others
        return point | {"failed": str(error).splitlines()[0][:200]}
    return point | {"us": 1e6 * best} | {f"{name}_per_s": amount / best for name, amount in work.items()}
