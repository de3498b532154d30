"""What every tier of the KV cache holds, found and lost: engine -> `CacheFigure`s, for `get_metrics` and `/metrics`.

Reads the pool, the scheduler and the tiers; changes nothing. Plain sums: reading them needs no lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine


class CacheFigure(NamedTuple):
    """One figure: `kind` is "gauge" or "counter" (whose name ends in `_total` where it is exported)."""

    name: str
    kind: str
    text: str
    value: float


def cache_figures(engine: Engine) -> Iterator[CacheFigure]:
    """All figures, tier by tier. Bytes count what lies on every device, copies of key/value heads included."""
    yield from _device(engine)
    if engine.tiers is None or engine.mover is None:
        return
    tiers, stats = engine.tiers, engine.tiers.stats
    size, tokens = tiers.page_bytes, engine.pool.page_size
    yield from _tier("host", len(tiers.host) * size, tiers.host.capacity * size, tiers.host.num_evictions)
    yield CacheFigure(
        "prefix_cache_host_hits", "counter", "Prompt tokens found in host memory.", stats.host_hits * tokens
    )
    if (disk := engine.mover.disk) is not None:
        yield from _tier("disk", disk.num_bytes, disk.capacity, disk.num_evictions)
        hits = stats.disk_hits * tokens
        yield CacheFigure("prefix_cache_disk_hits", "counter", "Prompt tokens found on disk.", hits)
        yield CacheFigure("kv_disk_damaged_pages", "counter", "Pages whose checksum was wrong.", disk.num_damaged)
        dropped = engine.mover.num_dropped_writes
        yield CacheFigure("kv_disk_dropped_writes", "counter", "Pages lost because the disk was behind.", dropped)
    yield CacheFigure("kv_swaps_out", "counter", "Preempted requests whose cache was kept.", stats.swaps_out)
    yield CacheFigure("kv_swaps_in", "counter", "Requests that went on with a kept cache.", stats.swaps_in)
    yield CacheFigure("kv_failed_loads", "counter", "Loads that found less than was promised.", stats.failed_loads)
    for what, pages, seconds in (("out", stats.pages_out, stats.seconds_out), ("in", stats.pages_in, stats.seconds_in)):
        yield CacheFigure(
            f"kv_moved_{what}_bytes", "counter", f"Bytes moved {what} of or into device memory.", pages * size
        )
        yield CacheFigure(f"kv_moved_{what}_seconds", "counter", "Seconds that took, beside the engine.", seconds)


def _device(engine: Engine) -> Iterator[CacheFigure]:
    pool, scheduler = engine.pool, engine.scheduler
    size = engine.runner.page_bytes
    yield from _tier("device", (pool.num_usable - pool.num_free) * size, pool.num_usable * size, pool.num_evictions)
    cached = pool.num_idle * size
    yield CacheFigure("kv_device_cached_bytes", "gauge", "Free for others, but findable as a prefix.", cached)
    below = engine.tiers.stats if engine.tiers is not None else None
    hits = pool.num_hit_tokens - ((below.host_hits + below.disk_hits) * pool.page_size if below else 0)
    yield CacheFigure("prefix_cache_device_hits", "counter", "Prompt tokens found on the device.", hits)
    slots = scheduler.slot_utilization
    yield CacheFigure("kv_slot_utilization", "gauge", "Token slots in use of those in requests' pages, 0 to 1.", slots)
    yield CacheFigure(
        "kv_page_copies", "counter", "Pages copied because one of several owners wrote.", scheduler.num_copies
    )


def _tier(name: str, used: int, capacity: int, evictions: int) -> Iterator[CacheFigure]:
    yield CacheFigure(f"kv_{name}_bytes", "gauge", f"Bytes in use, {name}.", used)
    yield CacheFigure(f"kv_{name}_capacity_bytes", "gauge", f"Bytes there are, {name}.", capacity)
    share = used / capacity if capacity else 0.0
    yield CacheFigure(f"kv_{name}_usage_perc", "gauge", f"Share in use, {name}, 0 to 1.", share)
    yield CacheFigure(f"kv_{name}_evictions", "counter", f"Pages pushed out, {name}.", evictions)
