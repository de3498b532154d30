"""The one list of figures: what is queued, what the cache holds, what was done and how fast.

Engine -> `Figure`s, read by `get_metrics`, `/metrics`, `/stats` and through them the page. Reads, changes nothing;
plain sums, so reading needs no lock. Names are those that dashboards know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from jaxllm.kv.memory import KVMemory
    from jaxllm.scheduling.page_pool import PagePool
    from jaxllm.scheduling.replicas import ReplicaPools, Scheduling
    from jaxllm.telemetry.accounting import Accounting
    from jaxllm.telemetry.drafts import DraftTotals


class Figure(NamedTuple):
    """One figure: `kind` is "gauge" or "counter" (whose name ends in `_total` where it is exported)."""

    name: str
    kind: str
    text: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def exported_name(self) -> str:
        """As dashboards spell it."""
        return self.name + ("_total" if self.kind == "counter" else "")

    @property
    def labelled(self) -> str:
        """What follows the name where several figures have the same: `{position="0"}`, say."""
        labels = ",".join(f'{label}="{value}"' for label, value in self.labels)
        return f"{{{labels}}}" if labels else ""


class CompilingRunner(Protocol):
    """What is read of a runner."""

    @property
    def num_compilations(self) -> int: ...
    @property
    def num_compilations_after_warmup(self) -> int: ...


class Measured(Protocol):
    """What is read of an engine."""

    @property
    def pool(self) -> PagePool | ReplicaPools: ...
    @property
    def scheduler(self) -> Scheduling: ...
    @property
    def runner(self) -> CompilingRunner: ...
    @property
    def accounting(self) -> Accounting: ...
    @property
    def memory(self) -> KVMemory: ...
    @property
    def num_not_finite(self) -> int: ...
    @property
    def drafts(self) -> DraftTotals: ...
    @property
    def transfers(self) -> Transfers | None: ...
    @property
    def scoring_engine(self) -> Measured: ...


class Transfers(Protocol):
    """What handing requests over has moved; see `jaxllm.disaggregation.stats`."""

    handed_over: int
    failed: int
    bytes: int
    pages: int
    pages_skipped: int
    seconds: float
    exposed_seconds: float

    @property
    def hidden_share(self) -> float: ...


def get_metrics(engine: Measured) -> dict[str, object]:
    """Gauges, `*_total` sums since the engine started, and rates of the last iterations, by name.

    `mfu` and `mbu` (fractions of `ceilings`) and the `*_per_s` are sums over sums of device time over the last 64
    iterations that compiled nothing; `mfu` and `mbu` are None while the ceilings are unknown or nothing has run.
    """
    ceilings = engine.accounting.ceilings
    return {
        **{figure.exported_name + figure.labelled: figure.value for figure in figures(engine)},
        **engine.accounting.recent(),
        "ceilings": dataclasses.asdict(ceilings) if ceilings else None,
    }


def figures(engine: Measured) -> Iterator[Figure]:
    """All figures that are known now."""
    yield from _queues(engine)
    yield from _work(engine)
    yield from _drafts(engine)
    yield from _device(engine)
    yield from _tiers(engine)
    if engine.transfers is not None:
        yield from _transfers(engine.transfers)
    if engine.scoring_engine is not engine:
        yield from _prefill_pool(engine.scoring_engine)


def _transfers(moved: Transfers) -> Iterator[Figure]:
    yield Figure("kv_transfer_requests", "counter", "Requests handed over.", moved.handed_over)
    yield Figure("kv_transfer_failures", "counter", "Requests whose pages did not come.", moved.failed)
    yield Figure("kv_transfer_bytes", "counter", "Keys and values that travelled.", moved.bytes)
    yield Figure("kv_transfer_pages", "counter", "Pages filled with them.", moved.pages)
    yield Figure("kv_transfer_pages_skipped", "counter", "Pages the receiver had already.", moved.pages_skipped)
    yield Figure("kv_transfer_seconds", "counter", "Seconds that batches of pages took.", moved.seconds)
    yield Figure("kv_transfer_exposed_seconds", "counter", "Seconds requests waited for them.", moved.exposed_seconds)
    yield Figure("kv_transfer_hidden_perc", "gauge", "Share hidden behind prompts' computation.", moved.hidden_share)


def _prefill_pool(engine: Measured) -> Iterator[Figure]:
    pool, runner = engine.pool, engine.runner
    running = len(engine.scheduler.running)
    yield Figure("prefill_pool_requests_running", "gauge", "Requests in the prefill pool's batch.", running)
    usage = 1 - pool.num_free / pool.num_usable
    yield Figure("prefill_pool_kv_cache_usage_perc", "gauge", "Share of its pages in use, 0 to 1.", usage)
    after = runner.num_compilations_after_warmup
    yield Figure("prefill_pool_compilations_after_warmup", "counter", "Compiled while serving: defects.", after)


def _queues(engine: Measured) -> Iterator[Figure]:
    pool, scheduler = engine.pool, engine.scheduler
    queried, hits = pool.num_queried_tokens, pool.num_hit_tokens
    yield Figure("num_requests_running", "gauge", "Requests in the batch.", len(scheduler.running))
    yield Figure("num_requests_waiting", "gauge", "Requests accepted but not running.", scheduler.num_waiting)
    yield Figure("num_preemptions", "counter", "Requests pushed out of the batch.", scheduler.num_preemptions)
    failed = engine.num_not_finite
    yield Figure("requests_not_finite", "counter", "Requests that ended over NaN or infinite numbers.", failed)
    yield Figure("kv_cache_usage_perc", "gauge", "Share of pages in use, 0 to 1.", 1 - pool.num_free / pool.num_usable)
    yield Figure("prefix_cache_queries", "counter", "Prompt tokens looked up.", queried)
    yield Figure("prefix_cache_hits", "counter", "Prompt tokens found.", hits)
    yield Figure("prefix_cache_hit_rate", "gauge", "Share of them, 0 to 1.", hits / queried if queried else 0.0)


def _work(engine: Measured) -> Iterator[Figure]:
    totals, runner = engine.accounting.totals, engine.runner
    yield Figure("iterations", "counter", "Iterations run.", totals.num_iterations)
    yield Figure("prefill_tokens", "counter", "Prompt tokens computed.", totals.prefill_tokens)
    yield Figure("generation_tokens", "counter", "Tokens generated.", totals.generation_tokens)
    yield Figure("flops", "counter", "Operations of the model, all devices.", totals.flops)
    yield Figure("bytes", "counter", "Bytes of weights and cache read, all devices.", totals.bytes)
    yield Figure("device_seconds", "counter", "Time the device worked on iterations.", totals.seconds)
    yield Figure("compilations", "counter", "Programs compiled.", runner.num_compilations)
    after = runner.num_compilations_after_warmup
    yield Figure("compilations_after_warmup", "counter", "Programs compiled while serving: defects.", after)
    if (ceilings := engine.accounting.ceilings) is not None:
        yield Figure("peak_flops_per_second", "gauge", "Of all devices: 100% MFU.", ceilings.flops_per_s)
        yield Figure("peak_bytes_per_second", "gauge", "Of all devices: 100% MBU.", ceilings.bytes_per_s)
    recent = engine.accounting.recent()
    for what in ("mfu", "mbu"):
        if (value := recent[what]) is not None:
            yield Figure(what, "gauge", f"{what.upper()} of recent iterations, 0 to 1.", value)


def _drafts(engine: Measured) -> Iterator[Figure]:
    totals = engine.drafts
    if not totals.accepted_at:
        return
    yield Figure("spec_decode_num_drafts", "counter", "Times a request had drafts verified.", totals.num_drafts)
    yield Figure("spec_decode_num_draft_tokens", "counter", "Tokens drafted and verified.", totals.num_draft_tokens)
    yield Figure("spec_decode_num_accepted_tokens", "counter", "Of these, right.", totals.num_accepted_tokens)
    for i, count in enumerate(totals.accepted_at):
        name, text = "spec_decode_num_accepted_tokens_per_pos", "Of the drafts in each position, right."
        yield Figure(name, "counter", text, count, (("position", str(i)),))
    rate, length = totals.acceptance_rate, totals.mean_acceptance_length
    yield Figure("spec_decode_acceptance_rate", "gauge", "Share of drafted tokens that were right, 0 to 1.", rate)
    yield Figure("spec_decode_mean_acceptance_length", "gauge", "Tokens per request and iteration with drafts.", length)


def _device(engine: Measured) -> Iterator[Figure]:
    pool, scheduler = engine.pool, engine.scheduler
    size = engine.memory.page_bytes
    yield from _tier("device", (pool.num_usable - pool.num_free) * size, pool.num_usable * size, pool.num_evictions)
    yield Figure("kv_device_cached_bytes", "gauge", "Free for others, but findable as a prefix.", pool.num_idle * size)
    tiers = engine.memory.tiers
    stats = tiers.stats if tiers is not None else None
    hits = pool.num_hit_tokens - ((stats.host_hits + stats.disk_hits) * pool.page_size if stats else 0)
    yield Figure("prefix_cache_device_hits", "counter", "Prompt tokens found on the device.", hits)
    slots = scheduler.slot_utilization
    yield Figure("kv_slot_utilization", "gauge", "Token slots in use of those in requests' pages, 0 to 1.", slots)
    copies = scheduler.num_copies
    yield Figure("kv_page_copies", "counter", "Pages copied because one of several owners wrote.", copies)


def _tiers(engine: Measured) -> Iterator[Figure]:
    tiers, mover = engine.memory.tiers, engine.memory.mover
    if tiers is None or mover is None:
        return
    stats = tiers.stats
    size, tokens = tiers.page_bytes, engine.pool.page_size
    yield from _tier("host", len(tiers.host) * size, tiers.host.capacity * size, tiers.host.num_evictions)
    hits = stats.host_hits * tokens
    yield Figure("prefix_cache_host_hits", "counter", "Prompt tokens found in host memory.", hits)
    if (disk := mover.disk) is not None:
        yield from _tier("disk", disk.num_bytes, disk.capacity, disk.num_evictions)
        hits = stats.disk_hits * tokens
        yield Figure("prefix_cache_disk_hits", "counter", "Prompt tokens found on disk.", hits)
        yield Figure("kv_disk_damaged_pages", "counter", "Pages whose checksum was wrong.", disk.num_damaged)
        dropped = mover.num_dropped_writes
        yield Figure("kv_disk_dropped_writes", "counter", "Pages lost because the disk was behind.", dropped)
    yield Figure("kv_swaps_out", "counter", "Preempted requests whose cache was kept.", stats.swaps_out)
    yield Figure("kv_swaps_in", "counter", "Requests that went on with a kept cache.", stats.swaps_in)
    yield Figure("kv_failed_loads", "counter", "Loads that found less than was promised.", stats.failed_loads)
    for what, pages, seconds in (("out", stats.pages_out, stats.seconds_out), ("in", stats.pages_in, stats.seconds_in)):
        text = f"Bytes moved {what} of or into device memory."
        yield Figure(f"kv_moved_{what}_bytes", "counter", text, pages * size)
        yield Figure(f"kv_moved_{what}_seconds", "counter", "Seconds that took, beside the engine.", seconds)


def _tier(name: str, used: int, capacity: int, evictions: int) -> Iterator[Figure]:
    yield Figure(f"kv_{name}_bytes", "gauge", f"Bytes in use, {name}; copies on several devices counted.", used)
    yield Figure(f"kv_{name}_capacity_bytes", "gauge", f"Bytes there are, {name}.", capacity)
    share = used / capacity if capacity else 0.0
    yield Figure(f"kv_{name}_usage_perc", "gauge", f"Share in use, {name}, 0 to 1.", share)
    yield Figure(f"kv_{name}_evictions", "counter", f"Pages pushed out, {name}.", evictions)
