"""What to change where a deployment does not fit, by arithmetic alone.

A `Deployment` and how its memory is spent -> flags, each enough alone. Compiles nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from jaxllm.deployment.deployment import Deployment, Memory, deploy
from jaxllm.deployment.topology import Topology, open_topology, parse_topology
from jaxllm.sharding.rules import as_tuple

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TEMPORARIES = 0.05  # of the memory, where nothing has been compiled


def pages_by_arithmetic(deployment: Deployment, temporaries: float) -> int:
    """Pages that fit beside parameters, state and so many bytes."""
    used = deployment.model.parameter_bytes_per_device() + deployment.state_bytes + temporaries
    return max(0, int((deployment.budget - used) // deployment.page_bytes))


def what_would_fit(deployment: Deployment, memory: Memory) -> list[str]:
    """Changes, each enough alone by arithmetic."""
    advice, beside = [], memory.fixed or TEMPORARIES * deployment.limit
    num_pages = pages_by_arithmetic(deployment, beside)
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
            config = dataclasses.replace(deployment.config, mesh=mesh)
            larger = deploy(config, cfg, topology, deployment.limit, checkpoint=deployment.checkpoint)
        except ValueError:
            continue
        if pages_by_arithmetic(larger, temporaries) >= larger.shapes.num_pages:
            return f"--topology {topology.name} --mesh {mesh}"
    return None


def _slices(topology: Topology) -> Iterator[Topology]:
    """This slice and the usual larger ones."""
    kind, sizes = parse_topology(topology.name)
    yield topology
    for name in _FLAT if len(sizes) == 2 else _DEEP:
        if math.prod(map(int, name.split("x"))) > math.prod(sizes):
            yield open_topology(f"{kind}:{name}")
