"""Meshes and placements: `"tp=3"` and sharding rules -> `jax.sharding` objects.

The one place that knows devices. The decoder calls `Placement.shard`; the loader and the cache ask for
`NamedSharding`s.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.sharding.rules import TOKEN_DIMS, Axes, ShardingRules, as_tuple, fitting, num_parts, parse_mesh

log = logging.getLogger(__name__)
Dims = tuple[str | None, ...]
MAX_EMULATED = 512  # CPU devices of one process: each has threads of its own
_GOOGLE = "0x1ae0"  # PCI vendor of TPUs


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
        return PartitionSpec(*(self._present(part) for part in axes))

    def _present(self, axes: Axes) -> Axes:
        here = tuple(axis for axis in as_tuple(axes) if axis in self.mesh.axis_names)
        return here if len(here) > 1 else here[0] if here else None

    def ring_axis(self) -> str | None:
        """The axis that cuts the tokens of a replica, round which keys and values go; None: no such cut."""
        tokens, pages = self.rules.activations.get("tokens"), self.rules.activations.get("pages")
        return next((a for a in as_tuple(tokens)[len(as_tuple(pages)) :] if self.mesh.shape.get(a, 1) > 1), None)

    def ring_size(self) -> int:
        """Devices in the ring; 1: none."""
        axis = self.ring_axis()
        return self.mesh.shape[axis] if axis else 1

    def unringed(self) -> Placement:
        """As if the ring's axis were not there: for decodes, whose few rows every device of the ring computes."""
        if (axis := self.ring_axis()) is None:
            return self
        table = dict(self.rules.activations)
        for dim in TOKEN_DIMS:
            table[dim] = tuple(part for part in as_tuple(table.get(dim)) if part != axis)
        return replace(self, rules=replace(self.rules, activations=table))

    def fitted(self, num_tokens: int) -> Placement:
        """The placement of one program: no token dim of this static size is cut by axes that do not divide it.

        A decode of 4 rows on tp=8 runs as if the rules left its rows whole; larger programs are cut as they say.
        """
        table = self.rules.activations
        cut = {dim: fitting(table[dim], num_tokens, self.sizes) for dim in TOKEN_DIMS if dim in table}
        return replace(self, rules=replace(self.rules, activations={**table, **cut}))

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

        def run(*arguments: Any) -> Any:
            specs = tuple(_spec_of(value, self.spec(dims)) for value, dims in zip(arguments, in_dims, strict=True))
            local = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=self.spec(out_dims), check_vma=False
            )
            return local(*arguments)

        return run

    def gathered(self, module: nnx.Module) -> nnx.Module:
        """The module with its weights whole along the axes that the rules gather before use."""
        away = self.rules.gather_weights
        if not away or self.mesh.size == 1:
            return module

        def whole(_: Any, variable: Any) -> Any:
            spec = self.spec(variable.get_metadata("dims"), parameter=True)
            kept = PartitionSpec(*(tuple(axis for axis in as_tuple(part) if axis not in away) for part in spec))
            value = variable.get_value()
            shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), _spec_of(value, kept))
            return variable.replace(jax.lax.with_sharding_constraint(value, shardings))

        graph, state = nnx.split(module)
        return nnx.merge(graph, nnx.map_state(whole, state))

    @property
    def replicated(self) -> NamedSharding:
        """Whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parts(self, dim: str) -> int:
        """Into how many parts an activation's dim is cut."""
        return num_parts(self.rules.activations.get(dim), self.sizes)

    def token_multiple(self) -> int:
        """Of what a replica's token bucket must be a multiple so that every token cut divides it."""
        replicas, ring = self.parts("pages"), self.ring_size()
        cuts = [parts // math.gcd(parts, replicas) for parts in map(self.parts, TOKEN_DIMS)]
        return math.lcm(*cuts, 2 * ring if ring > 1 else 1)


def _spec_of(value: Any, spec: PartitionSpec) -> Any:
    """A spec for every array of a parameter: a stored matrix says how its own follow the parameter's."""
    return value.specs(spec) if hasattr(value, "specs") else spec


def make_mesh(text: str, devices: list[Any] | None = None, *, offset: int = 0) -> Mesh:
    """Build a mesh from `"dp=2,tp=4"` over the devices from number `offset` on, in the order of their links.

    Meshes with different offsets stand side by side in one process. On a machine with nothing but CPUs the devices
    are emulated, as many as the mesh needs. Raises ValueError when there are too few devices, or where one of several
    processes would have none of them: it could not take part.
    """
    sizes = parse_mesh(text)
    needed = math.prod(sizes.values())
    if devices is None:
        _ignore_absent_tpus()
        _emulate_on_cpu(offset + needed)
        devices = jax.devices()
        _check_processes(text, devices[offset : offset + needed])
    if offset + needed > len(devices):
        raise ValueError(_too_few(text, offset, needed, devices))
    grid = _along_links(tuple(sizes.values()), devices[offset : offset + needed])
    return Mesh(grid, tuple(sizes))


def _too_few(text: str, offset: int, needed: int, devices: Sequence[Any]) -> str:
    wants = f"mesh {text!r} needs {needed} devices" + (f" from number {offset} on" if offset else "")
    platform, total = devices[0].platform, offset + needed
    there_are = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)} ({platform})"
    if total > MAX_EMULATED:
        return f"{wants} but {there_are}; use a smaller mesh, or check one on paper with `jaxllm plan`"
    return f"{wants} but {there_are}; use a smaller mesh, or emulate: JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={total}"


def _check_processes(text: str, used: Sequence[Any]) -> None:
    absent = set(range(jax.process_count())) - {device.process_index for device in used}
    if absent and used:
        raise ValueError(
            f"mesh {text!r} has no device of process {min(absent)}: it takes {len(used)} of {jax.device_count()}; use "
            "a larger mesh or fewer processes"
        )


def _along_links(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """The devices of a TPU slice so that neighbours on a mesh axis are neighbours on the torus; others as they come."""
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        try:
            return mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
        except (AssertionError, IndexError, NotImplementedError, ValueError) as error:
            log.info("the devices of mesh %s are taken in order, not along their links: %s", shape, error)
    return np.array(devices).reshape(shape)


def _ignore_absent_tpus() -> None:
    """Where libtpu is installed (for `jaxllm plan`) and no TPU, JAX would look for one and complain at length."""
    if jax.config.values["jax_platforms"] or importlib.util.find_spec("libtpu") is None:
        return
    accelerators = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    vendors = (Path(file).read_text().strip() for file in glob.glob("/sys/bus/pci/devices/*/vendor"))
    if not any(glob.glob(pattern) for pattern in accelerators) and _GOOGLE not in vendors:
        jax.config.update("jax_platforms", "cpu")


def _emulate_on_cpu(needed: int) -> None:
    """Ask for `needed` CPU devices, where nothing was said about their number and no backend has started."""
    flags = os.environ.get("XLA_FLAGS", "")
    if (
        needed == 1
        or needed > MAX_EMULATED
        or jax.config.values["jax_num_cpu_devices"] > 0
        or "xla_force_host_platform_device_count" in flags
    ):
        return
    try:
        jax.config.update("jax_num_cpu_devices", needed)
    except RuntimeError:  # a backend has started: what it has is what there is
        return
    if jax.default_backend() == "cpu":
        print(f"jaxllm: emulating {needed} devices on this CPU", file=sys.stderr)
