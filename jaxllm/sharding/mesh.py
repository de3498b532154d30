"""Meshes and placements: `"tp=3"` and sharding rules -> `jax.sharding` objects.

The one place that knows devices. The decoder calls `Placement.shard`; the loader and the cache ask for
`NamedSharding`s.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.sharding.rules import ShardingRules, parse_mesh

log = logging.getLogger(__name__)
Dims = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A mesh and the rules that say which dim lies on which of its axes."""

    mesh: Mesh
    rules: ShardingRules

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> number of devices along it."""
        return dict(self.mesh.shape)

    def spec(self, dims: tuple[str | None, ...], *, parameter: bool = False) -> PartitionSpec:
        """Partition spec of an array with these dims; axes that the mesh lacks do not cut."""
        axes = self.rules.axes(dims, parameter=parameter)
        return PartitionSpec(*(axis if axis in self.mesh.axis_names else None for axis in axes))

    def sharding(self, *dims: str | None, parameter: bool = False) -> NamedSharding:
        """Where an array with these dims lies."""
        return NamedSharding(self.mesh, self.spec(dims, parameter=parameter))

    def shard(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """Constrain an activation inside a jitted function."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*dims))

    def over_shards(self, function: Callable, in_dims: Sequence[Dims], out_dims: Dims) -> Callable:
        """`function` on each device for the part of every argument that lies there."""
        if self.mesh.size == 1:
            return function
        specs = tuple(self.spec(dims) for dims in in_dims)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=self.spec(out_dims), check_vma=False)

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def heads_axis(self) -> str | None:
        """The axis that cuts attention heads, if any."""
        return self.spec(("heads",))[0]


def make_mesh(text: str, devices: list[Any] | None = None, *, offset: int = 0) -> Mesh:
    """Build a mesh from `"dp=2,tp=4"` over the devices from number `offset` on, in the order of their links.

    Meshes with different offsets stand side by side in one process. On a machine with nothing but CPUs the devices
    are emulated, as many as the mesh needs. Raises ValueError when there are too few devices.
    """
    sizes = parse_mesh(text)
    needed = math.prod(sizes.values())
    if devices is None:
        _emulate_on_cpu(offset + needed)
        devices = jax.devices()
    if offset + needed > len(devices):
        wants = f"mesh {text!r} needs {needed} devices"
        wants += f" from number {offset} on" if offset else ""
        raise ValueError(
            f"{wants} but there are {len(devices)} ({devices[0].platform}); use a smaller "
            f"mesh, or emulate: JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={offset + needed}"
        )
    grid = _along_links(tuple(sizes.values()), devices[offset : offset + needed])
    return Mesh(grid, tuple(sizes))


def _along_links(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of a TPU slice so that neighbours on a mesh axis are neighbours on the torus; others as they come."""
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        try:
            return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        except (AssertionError, IndexError, NotImplementedError, ValueError) as error:
            log.info("the devices of mesh %s are taken in order, not along their links: %s", shape, error)
    return np.array(devices).reshape(shape)


def _emulate_on_cpu(needed: int) -> None:
    """Ask for `needed` CPU devices, where nothing was said about their number and no backend has started."""
    flags = os.environ.get("XLA_FLAGS", "")
    if needed == 1 or jax.config.values["jax_num_cpu_devices"] > 0 or "xla_force_host_platform_device_count" in flags:
        return
    try:
        jax.config.update("jax_num_cpu_devices", min(needed, 512))
    except RuntimeError:  # a backend has started: what it has is what there is
        return
    if jax.default_backend() == "cpu":
        print(f"jaxllm: emulating {needed} devices on this CPU", file=sys.stderr)
