"""A deployment checked before the chips are rented: the engine's own programs, compiled for a TPU slice.

An `EngineConfig` and a topology -> what fits, with the compiler's own figures for memory and collectives, and lower
bounds of time. Weights are not read, nothing runs. What a program costs in time beyond its bounds is not known here.

Memory of one device: parameters (as they lie, copies and padding included), what the programs need beside them
(temporaries and slot state), and pages of the KV cache in the rest.
"""

from __future__ import annotations

import time
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.deployment.advice import what_would_fit
from jaxllm.deployment.compiled import Overflow, compile_programs
from jaxllm.deployment.deployment import Deployment, Memory, bounds, open_deployment
from jaxllm.deployment.program_text import CompiledProgram, count_by_kind

_PAGE_STEP = 128  # page counts that are compiled are multiples of it: some layouts pad to it
_SECOND_POINT = 4096  # pages between the two programs that show how temporaries grow


def make_plan(config: EngineConfig, topology_name: str, *, context: int | None = None) -> dict[str, Any]:
    """Compile prefill and decode for a slice and say what fits. Keys as in `jaxllm plan --json`.

    Args:
        config: as the engine will be started; `kv_cache_memory_bytes` fixes the pages instead of filling the memory.
        topology_name: for example `v5e:4x4`.
        context: tokens in the cache of every row for the decode bound; default: `max_model_len`.

    Raises:
        ValueError: for an unknown topology or model, a mesh that cannot be, or a missing libtpu.
    """
    deployment = open_deployment(config, topology_name)
    started = time.perf_counter()
    memory = _too_large(deployment) or measure_memory(deployment)
    return _report(deployment, memory, time.perf_counter() - started, context)


def _too_large(deployment: Deployment) -> Memory | None:
    """Where arithmetic shows already that nothing can fit: the reason, and nothing is compiled."""
    parameters = deployment.model.parameter_bytes_per_device()
    least = parameters + deployment.state_bytes + deployment.shapes.num_pages * deployment.page_bytes
    if least <= deployment.budget:
        return None
    what = "the parameters alone" if parameters > deployment.budget else "parameters and the pages of one request"
    return Memory(fixed=float(deployment.state_bytes), per_page=deployment.page_bytes, problem=what)


def measure_memory(deployment: Deployment) -> Memory:
    """Compile with few pages; with more, too, where the programs hold pages in several layouts and so copy them."""
    low = -(-deployment.shapes.num_pages // _PAGE_STEP) * _PAGE_STEP
    try:
        programs = compile_programs(deployment, low)
        fixed, per_page = _needed(deployment, programs), float(deployment.page_bytes)
        if max(p.page_layouts for p in programs.values()) > 1:
            high = low + _SECOND_POINT
            above = _needed(deployment, compile_programs(deployment, high))
            growth = max(0.0, above - fixed) / (high - low)
            fixed, per_page = max(0.0, fixed - growth * low), per_page + growth
    except Overflow as overflow:
        return Memory(problem=str(overflow), per_page=deployment.page_bytes)
    return Memory(fixed, per_page, programs=programs)


def _needed(deployment: Deployment, programs: dict[str, CompiledProgram]) -> float:
    """Bytes beside parameters and pages. A row that is not greedy samples inside the decode loop: hence the sum."""
    beside = max(programs["prefill"].temporaries, programs["decode"].temporaries + programs["sampler"].temporaries)
    decode = programs["decode"]
    padding = decode.arguments - decode.donated - deployment.model.parameter_bytes_per_device()
    return float(beside + deployment.state_bytes + max(0, padding))


def _report(deployment: Deployment, memory: Memory, seconds: float, context: int | None) -> dict[str, Any]:
    config, shapes, model = deployment.config, deployment.shapes, deployment.model
    parameters = model.parameter_bytes_per_device()
    room = deployment.budget - parameters - memory.fixed
    num_pages = max(0, int(room // memory.per_page))
    if config.kv_cache_memory_bytes is not None:
        num_pages, room = _asked_pages(deployment), room - _asked_pages(deployment) * memory.per_page
        problem = memory.problem or (None if room >= 0 else "the KV cache that was asked for")
    else:
        problem = memory.problem or (None if num_pages >= shapes.num_pages else "the pages of one request")
    num_pages = num_pages if memory.problem is None else shapes.num_pages
    growth = (memory.per_page - deployment.page_bytes) * num_pages
    spent = {
        "parameters": parameters,
        "kv_pages": num_pages * deployment.page_bytes,
        "temporaries": int(memory.fixed + growth),
        "limit": deployment.limit,
    }
    kv_tokens = max(0, num_pages - 1) * shapes.page_size * shapes.num_replicas if problem is None else 0
    max_len = min(shapes.max_model_len, kv_tokens) if config.max_model_len is None else shapes.max_model_len
    lower = bounds(deployment, context or shapes.max_model_len, memory.programs or None)
    report = {
        "fits": problem is None,
        "model": config.model,
        "topology": deployment.topology.name,
        "chip": deployment.topology.chip.name,
        "num_devices": model.placement.mesh.size,
        "mesh": model.placement.sizes,
        "sharding_rules": config.sharding_rules,
        "bytes_per_device": spent,
        "budget_per_device": int(deployment.budget),
        "kv_tokens": kv_tokens,
        "num_pages": num_pages if problem is None else 0,
        "max_model_len": max_len,
        "max_num_seqs": shapes.max_num_seqs,
        "prefill_tokens": shapes.max_num_batched_tokens,
        "context": context or shapes.max_model_len,
        "collectives": {
            p: count_by_kind(memory.programs[p].collectives) if memory.programs else {} for p in ("decode", "prefill")
        },
        "lower_bound_ms": {phase: lower[phase]["ms"] for phase in ("decode", "prefill")},
        "bound_by": lower["decode"]["bound_by"],
        "bound_by_prefill": lower["prefill"]["bound_by"],
        "terms_ms": {phase: lower[phase]["terms_ms"] for phase in ("decode", "prefill")},
        "program_bytes": sum(p.code for p in memory.programs.values()),
        "copies_pages": memory.per_page > deployment.page_bytes,
        "compile_seconds": round(seconds, 2),
        "notes": list(deployment.notes),
    }
    if problem is None:
        report["kv_cache_memory_bytes"] = num_pages * _page_bytes_of_all(deployment)
    else:
        total = parameters + memory.fixed + (growth + num_pages * deployment.page_bytes)
        report["too_big"] = {"what": problem, "bytes_over": max(0, int(total - deployment.budget))}
        report["would_fit"] = what_would_fit(deployment, memory)
    return report


def _page_bytes_of_all(deployment: Deployment) -> int:
    """One page as `kv_cache_memory_bytes` counts it: over all devices that share it."""
    from jaxllm.kv.layout import token_bytes

    model, shapes = deployment.model, deployment.shapes
    return token_bytes(model.cfg, shapes.kv_dtype, model.kv_copies) * shapes.page_size


def _asked_pages(deployment: Deployment) -> int:
    assert deployment.config.kv_cache_memory_bytes is not None
    return deployment.config.kv_cache_memory_bytes // _page_bytes_of_all(deployment)
