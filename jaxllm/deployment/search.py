"""Which mesh and rules to take: every legal pair on a slice by arithmetic, ranked by the decode bound.

Collectives are not in the arithmetic; compile the best few (`make_plan`) to have them. Also what to change where a
plan does not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.deployment.plan import Deployment, Memory, bounds, deploy, make_plan, open_deployment
from jaxllm.deployment.topology import Topology, open_topology, parse_topology
from jaxllm.sharding.rules import MESH_AXES, as_tuple, load_rules, rules_folder

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_TEMPORARIES = 0.05  # of the memory, where nothing has been compiled


def search(config: EngineConfig, topology_name: str, *, context: int | None = None, compile_best: int = 0) -> dict:
    """Rank the legal meshes and shipped rule files that use every device of a slice.

    Args:
        config: its `mesh` and `sharding_rules` are ignored.
        topology_name: for example `v5e:4x4`.
        context: as for `make_plan`.
        compile_best: compile so many of the best and rank them by what the compiler says.

    Returns:
        `{"topology", "chip", "num_devices", "candidates": [...], "plans": [...]}`, best first.
    """
    first = open_deployment(dataclasses.replace(config, mesh="tp=1", sharding_rules="replicated"), topology_name)
    candidates = []
    for deployment in _legal(first, config):
        candidates.append(_candidate(deployment, context))
    candidates.sort(key=lambda c: (not c["fits"], c["lower_bound_ms"], c["sharding_rules"] != "megatron"))
    best = [
        make_plan(
            dataclasses.replace(config, mesh=c["mesh"], sharding_rules=c["sharding_rules"]),
            topology_name,
            context=context,
        )
        for c in candidates[:compile_best]
    ]
    best.sort(key=lambda plan: (not plan["fits"], plan["lower_bound_ms"]["decode"]))
    return {
        "model": config.model,
        "topology": first.topology.name,
        "chip": first.topology.chip.name,
        "num_devices": len(first.topology.devices),
        "candidates": candidates,
        "plans": best,
    }


def _legal(first: Deployment, config: EngineConfig) -> Iterator[Deployment]:
    """What can be deployed: illegal cuts say so with a ValueError."""
    cfg, devices = first.model.cfg, len(first.topology.devices)
    for path in sorted(rules_folder().glob("*.toml")):
        for mesh in _meshes(cfg, path.stem, devices):
            try:
                yield deploy(
                    dataclasses.replace(config, mesh=mesh, sharding_rules=path.stem), cfg, first.topology, first.limit
                )
            except ValueError:
                continue


def _meshes(cfg: ModelConfig, rules_name: str, num_devices: int) -> list[str]:
    """Ways to spread all devices over the axes that the rules cut something of this model by."""
    rules = load_rules(rules_name)
    used = {a for cut in (*rules.parameters.values(), *rules.activations.values()) for a in as_tuple(cut)}
    axes = [axis for axis in MESH_AXES if axis in used and (axis != "ep" or cfg.experts)]
    meshes = []
    for sizes in _factors(num_devices, len(axes)):
        meshes.append(",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True) if size > 1))
    return [mesh or f"{axes[0]}=1" for mesh in meshes]


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 0:
        return
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)


def _candidate(deployment: Deployment, context: int | None) -> dict[str, Any]:
    shapes, config = deployment.shapes, deployment.config
    lower = bounds(deployment, context or shapes.max_model_len)["decode"]
    num_pages = _pages_by_arithmetic(deployment, _TEMPORARIES * deployment.limit)
    return {
        "mesh": config.mesh,
        "sharding_rules": config.sharding_rules,
        "fits": num_pages >= shapes.num_pages,
        "parameters": deployment.model.parameter_bytes_per_device(),
        "kv_tokens": max(0, num_pages - 1) * shapes.page_size,
        "lower_bound_ms": lower["ms"],
        "bound_by": lower["bound_by"],
    }


def _pages_by_arithmetic(deployment: Deployment, temporaries: float) -> int:
    used = deployment.model.parameter_bytes_per_device() + deployment.state_bytes + temporaries
    return max(0, int((deployment.budget - used) // deployment.page_bytes))


def what_would_fit(deployment: Deployment, memory: Memory) -> list[str]:
    """Changes, each enough alone by arithmetic."""
    advice, beside = [], memory.fixed or _TEMPORARIES * deployment.limit
    num_pages = _pages_by_arithmetic(deployment, beside)
    if 2 <= num_pages < deployment.shapes.num_pages:
        advice.append(f"--max-model-len {(num_pages - 1) * deployment.shapes.page_size}")
    if larger := _larger(deployment, beside):
        advice.append(larger)
    return advice


def _larger(deployment: Deployment, temporaries: float) -> str | None:
    """The smallest slice of the same chip, and `tp` on it, that has room."""
    rules, cfg = deployment.model.placement.rules, deployment.model.cfg
    if not any("tp" in as_tuple(axes) for axes in rules.parameters.values()):
        return "sharding rules that cut the parameters, such as --sharding-rules megatron"
    for topology in _slices(deployment.topology):
        count = len(topology.devices)
        sizes = {**deployment.model.placement.sizes, "tp": 1}
        tp = count // math.prod(sizes.values())
        if tp <= deployment.model.placement.sizes.get("tp", 1):
            continue
        mesh = ",".join(f"{axis}={size}" for axis, size in {**sizes, "tp": tp}.items())
        try:
            larger = deploy(dataclasses.replace(deployment.config, mesh=mesh), cfg, topology, deployment.limit)
        except ValueError:
            continue
        if _pages_by_arithmetic(larger, temporaries) >= larger.shapes.num_pages:
            return f"--topology {topology.name} --mesh {mesh}"
    return None


def _slices(topology: Topology) -> Iterator[Topology]:
    """This slice and the usual larger ones."""
    kind, sizes = parse_topology(topology.name)
    yield topology
    for name in _FLAT if len(sizes) == 2 else _DEEP:
        if math.prod(map(int, name.split("x"))) > math.prod(sizes):
            yield open_topology(f"{kind}:{name}")
