"""A deployment checked before the chips are rented: the engine's own programs, compiled for a TPU slice.

An `EngineConfig` and a topology -> what fits, with the compiler's own figures for memory and collectives, and lower
bounds of time. Weights are not read, nothing runs. What a program costs in time beyond its bounds is not known here.

Memory of one device: parameters (as they lie, copies and padding included), what the programs need beside them
(temporaries and slot state), and pages of the KV cache in the rest.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.deployment.collectives import count_by_kind
from jaxllm.deployment.compiled import CompiledProgram, Overflow, compile_programs
from jaxllm.deployment.topology import Topology, memory_limit, open_topology
from jaxllm.roofline.bounds import Collective, DeviceWork, lower_bound
from jaxllm.sharding.rules import as_tuple

if TYPE_CHECKING:
    from jaxllm.runner.programs import DeviceState
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.weights.loader import AbstractModel

_PAGE_STEP = 128  # page counts that are compiled are multiples of it: some layouts pad to it
_SECOND_POINT = 4096  # pages between the two programs that show how temporaries grow


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on the mesh of one slice, and its static sizes with the fewest pages that make sense."""

    config: EngineConfig
    topology: Topology
    model: AbstractModel
    shapes: RunnerShapes
    limit: int
    notes: tuple[str, ...] = ()

    @property
    def budget(self) -> float:
        """Bytes of one device that the engine may use."""
        return self.limit * self.config.gpu_memory_utilization

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer on one device."""
        return _local_bytes(self._state().pages) // self.shapes.num_pages

    @property
    def state_bytes(self) -> int:
        """Bytes of the per-slot state on one device."""
        return _local_bytes(self._state().slots)

    def _state(self) -> DeviceState:
        from jaxllm.runner.programs import abstract_state

        return abstract_state(self.model, self.shapes)


@dataclass(slots=True)
class Memory:
    """How the memory of one device is spent: `temporaries` and `pages` grow with the number of pages, linearly."""

    fixed: float = 0.0
    per_page: float = 0.0
    problem: str | None = None
    programs: dict[str, CompiledProgram] = field(default_factory=dict)


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


def open_deployment(config: EngineConfig, topology_name: str) -> Deployment:
    """Everything that is known without compiling. Raises ValueError as `make_plan`."""
    from jaxllm.families.presets import model_config
    from jaxllm.sharding.rules import load_rules, parse_mesh

    parse_mesh(config.mesh)
    load_rules(config.sharding_rules)
    topology = open_topology(topology_name)
    cfg, notes = _stretch(model_config(config.model), config.max_model_len)
    return deploy(config, cfg, topology, memory_limit(topology), notes)


def deploy(
    config: EngineConfig, cfg: ModelConfig, topology: Topology, limit: int, notes: tuple[str, ...] = ()
) -> Deployment:
    """A configuration on the mesh of a slice that is open already. Raises ValueError where it is not legal."""
    from jaxllm.engine.build import make_model
    from jaxllm.runner.shapes import runner_shapes
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules

    placement = Placement(make_mesh(config.mesh, list(topology.devices)), load_rules(config.sharding_rules))
    model = make_model(config, cfg, placement)
    model.shardings()  # refuses what does not divide
    max_len = config.max_model_len or cfg.max_position_embeddings
    enough = dataclasses.replace(config, max_model_len=max_len, kv_cache_memory_bytes=1 << 60)
    shapes = runner_shapes(enough, model)
    pages = shapes.pages_per_row + 1 if config.max_model_len else 2
    return Deployment(config, topology, model, dataclasses.replace(shapes, num_pages=pages), limit, notes)


def _stretch(cfg: ModelConfig, max_model_len: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """A plan may look beyond the positions a model was trained for, as long as they are not a table of weights."""
    if max_model_len is None or max_model_len <= cfg.position_limit or cfg.learned_positions:
        return cfg, ()
    note = f"max_model_len={max_model_len} is beyond the model's {cfg.position_limit} positions"
    note += "; an engine refuses it"
    return dataclasses.replace(cfg, max_position_embeddings=max_model_len), (note,)


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


def _local_bytes(arrays: Any) -> int:
    import jax

    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def device_work(deployment: Deployment, *, tokens: int, rows: int, context: int) -> DeviceWork:
    """What one device reads and multiplies for `tokens` tokens of `rows` rows with `context` tokens in the cache.

    Every parameter once (of routed experts those that are hit), two FLOPs per parameter and token. The devices of
    an axis that the rules use share the work; those of another repeat it.
    """
    from jaxllm.roofline.cost_model import active_parameters, attention_windows, model_cost

    model, sizes = deployment.model, deployment.model.placement.sizes
    rules = model.placement.rules
    used = {a for axes in (*rules.parameters.values(), *rules.activations.values()) for a in as_tuple(axes)}
    sharers = math.prod(size for axis, size in sizes.items() if axis in used)
    cost = model_cost(model.cfg)
    idle = (1 - cost.experts_touched) ** tokens * cost.expert_bytes / (2 * model.cfg.num_parameters)
    windows = attention_windows(model.cfg)
    seen = sum(n * min(context, window or context) for window, n in windows) / sum(n for _, n in windows)
    token_bytes = deployment.page_bytes / deployment.shapes.page_size
    return DeviceWork(
        weight_bytes=model.parameter_bytes_per_device() * (1 - idle),
        kv_bytes=rows * seen * token_bytes,
        flops=2 * tokens * deployment.shapes.num_replicas * active_parameters(model.cfg) / sharers,
    )


def bounds(deployment: Deployment, context: int, programs: dict[str, CompiledProgram] | None = None) -> dict[str, Any]:
    """Lower bounds of one decode iteration of all rows and of one prefill chunk without a prefix."""
    shapes, chip, size = deployment.shapes, deployment.topology.chip, deployment.model.placement.mesh.size
    rows, chunk = shapes.max_num_seqs, shapes.max_num_batched_tokens
    work = {
        "decode": device_work(deployment, tokens=rows, rows=rows, context=context),
        "prefill": device_work(deployment, tokens=chunk, rows=0, context=0),
    }
    result = {}
    for phase, one in work.items():
        found = programs[phase].collectives if programs else []
        sent = tuple(Collective(f.kind, f.num_bytes, f.group_size or size) for f in found)
        result[phase] = lower_bound(dataclasses.replace(one, collectives=sent), chip)
    return result


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
        "collectives": {p: count_by_kind(memory.programs[p].collectives) if memory.programs else {}
                        for p in ("decode", "prefill")},
        "lower_bound_ms": {phase: lower[phase]["ms"] for phase in ("decode", "prefill")},
        "bound_by": lower["decode"]["bound_by"],
        "bound_by_prefill": lower["prefill"]["bound_by"],
        "terms_ms": {phase: lower[phase]["terms_ms"] for phase in ("decode", "prefill")},
        "program_bytes": sum(p.code for p in memory.programs.values()),
        "copies_pages": memory.per_page > deployment.page_bytes,
        "compile_seconds": round(seconds, 2),
        "notes": list(deployment.notes),
    }  # fmt: skip
    if problem is None:
        report["kv_cache_memory_bytes"] = num_pages * _page_bytes_of_all(deployment)
    else:
        from jaxllm.deployment.search import what_would_fit

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
