"""What a pool tells of itself: models, bytes and switches as plain data, and figures for dashboards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxllm.pool.model import PooledModel, State
from jaxllm.pool.pool import Pool
from jaxllm.telemetry.figures import Figure

_SHOWN_SWITCHES = 32


def pool_state(pool: Pool) -> dict[str, Any]:
    """Who is where, the budgets in bytes, and the latest switches. `absent` are models that no request has loaded yet,
    that left, or that failed."""
    residents, current = pool.residents, pool.residents.current
    states = [model_state(model) for model in pool.models]
    absent = (State.ABSENT, State.FAILED)
    budget, slabs = residents.budget, pool.host_kv.slabs
    return {
        "running": [state for state in states if state["state"] not in absent],
        "absent": [state for state in states if state["state"] in absent],
        "current": current.name if current is not None else None,
        "policy": pool.config.policy,
        "device_bytes": {"limit": budget.limit, "used": budget.used, "peak": budget.peak},
        "sleeping_kv_bytes": {"limit": slabs.num_slabs * slabs.slab_bytes, "used": slabs.used_bytes},
        "totals": dataclasses.asdict(residents.totals),
        "switches": [dataclasses.asdict(switch) for switch in list(residents.switches)[-_SHOWN_SWITCHES:]],
    }


def model_state(model: PooledModel) -> dict[str, Any]:
    """One model; bytes are of each device, `keep_alive` in seconds, -1 for ever."""
    sizes = model.residence.sizes if model.residence is not None else None
    return {
        "id": model.name,
        "model": model.name,
        "state": str(model.state),
        "place": model.place,
        "stage": model.stage,
        "error": str(model.error) if model.error is not None else None,
        "requests": len(model.open),
        "pinned": model.entry.pinned,
        "priority": model.entry.priority,
        "keep_alive": -1 if math.isinf(model.keep_alive) else model.keep_alive,
        "weight_bytes": sizes.weights if sizes else None,
        "cache_bytes": sizes.cache if sizes else None,
        "switches": model.num_switches,
        "switch_seconds": model.measured.switch,
    }


def pool_figures(pool: Pool) -> Iterator[tuple[str, Figure]]:
    """Figures with the name of the model that they are of, or ""."""
    totals, budget, slabs = pool.residents.totals, pool.residents.budget, pool.host_kv.slabs
    for model in pool.models:
        here, ready = model.place == "device", model.state is State.READY
        yield model.name, Figure("model_ready", "gauge", "Whether the model is loaded.", ready)
        yield model.name, Figure("model_on_device", "gauge", "Whether its weights are on the device.", here)
        yield model.name, Figure("model_switches", "counter", "Times it came onto the device.", model.num_switches)
    waited = totals.seconds
    yield "", Figure("pool_switch_seconds", "counter", "Seconds that the device waited for switches.", waited)
    yield "", Figure("pool_weight_copy_seconds", "counter", "Seconds that copying weights took.", totals.copy_seconds)
    yield "", Figure("pool_weight_copy_bytes", "counter", "Bytes of weights copied to the device.", totals.num_bytes)
    yield "", Figure("pool_kv_copy_seconds", "counter", "Seconds that copying KV took.", totals.cache_copy_seconds)
    yield "", Figure("pool_kv_copy_bytes", "counter", "Bytes of KV copied to the host and back.", totals.cache_bytes)
    yield "", Figure("pool_kv_wait_seconds", "counter", "Seconds of these waited for.", totals.cache_wait_seconds)
    yield "", Figure("pool_prefetches", "counter", "Weights fetched while another model ran.", totals.prefetches)
    yield "", Figure("pool_device_bytes", "gauge", "Bytes of each device in use.", budget.used)
    yield "", Figure("pool_device_capacity_bytes", "gauge", "Bytes of each device there are.", budget.limit)
    yield (
        "",
        Figure("pool_sleeping_kv_bytes", "gauge", "Bytes of sleeping models' pages in the host.", slabs.used_bytes),
    )
