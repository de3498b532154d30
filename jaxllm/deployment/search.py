"""Which mesh and rules to take: every legal pair on a slice by arithmetic, ranked by the decode bound.

Collectives are not in the arithmetic; compile the best few (`make_plan`) to have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.deployment.advice import TEMPORARIES, pages_by_arithmetic
from jaxllm.deployment.deployment import Deployment, bounds, deploy, open_deployment
from jaxllm.deployment.plan import make_plan
from jaxllm.sharding.rules import MESH_AXES, as_tuple, load_rules, rules_folder


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
                one = dataclasses.replace(config, mesh=mesh, sharding_rules=path.stem)
                yield deploy(one, cfg, first.topology, first.limit, checkpoint=first.checkpoint)
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
    num_pages = pages_by_arithmetic(deployment, TEMPORARIES * deployment.limit)
    return {
        "mesh": config.mesh,
        "sharding_rules": config.sharding_rules,
        "fits": num_pages >= shapes.num_pages,
        "parameters": deployment.model.parameter_bytes_per_device(),
        "kv_tokens": max(0, num_pages - 1) * shapes.page_size,
        "lower_bound_ms": lower["ms"],
        "bound_by": lower["bound_by"],
    }
