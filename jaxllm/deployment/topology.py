"""TPU slices without TPUs: a name like `v5e:4x4` -> devices that programs can be compiled for, and their chip.

Needs libtpu (the extra `plan`), which holds the TPU compiler; no TPU and no network. Nothing can be run or stored on
these devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxllm.roofline.chips import CHIPS, Chip, Torus

# What a slice is called in a topology: the chip, and how many sizes its name has.
_KINDS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5p", 3), "v6e": ("v6e", 2), "tpu7x": ("v7", 3)}
_EXAMPLES = "v5e:2x4, v6e:2x2, v5p:2x2x1"
_MAX_CHIPS = {2: 256, 3: 8192}  # of one slice; far beyond these the compiler aborts the process
_GIB = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Topology:
    """The devices of one slice; `chip` has the rates of one device (half a chip on v4 and v7)."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def prepare_environment() -> None:
    """Tell JAX and libtpu that there is no TPU here. Called before JAX starts; what the user set stays."""
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at a time share no hardware
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # without these two libtpu complains on standard error
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """`"v5e:4x4"` -> `("v5e", (4, 4))`. Raises ValueError with what would be right."""
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name.strip().lower())
    if match is None or match[1] not in _KINDS:
        raise ValueError(
            f"topology {name!r} is not understood; write chip:sizes like {_EXAMPLES}, with {', '.join(_KINDS)}"
        )
    kind, sizes = match[1], tuple(int(size) for size in match[2].split("x"))
    num_sizes = _KINDS[kind][1]
    if len(sizes) != num_sizes or not 1 <= math.prod(sizes) <= _MAX_CHIPS[num_sizes]:
        raise ValueError(
            f"topology {name!r}: a slice of {kind} has {num_sizes} sizes and at most {_MAX_CHIPS[num_sizes]} chips, "
            f"for example {kind}:{'2x2' if num_sizes == 2 else '2x2x1'}"
        )
    return kind, sizes


def open_topology(name: str) -> Topology:
    """The slice's devices. Raises ValueError for a slice that does not exist, or without libtpu."""
    kind, sizes = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('compiling for TPUs needs libtpu; install it with: pip install "jaxllm[plan]"')
    prepare_environment()
    devices = _devices(name.strip().lower(), sizes)
    chip = CHIPS[_KINDS[kind][0]]
    return Topology(f"{kind}:{'x'.join(map(str, sizes))}", _of_device(chip, len(devices) // math.prod(sizes)), devices)


def _devices(name: str, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    import jax
    from jax.experimental import topologies

    try:
        try:
            return tuple(topologies.get_topology_desc(name, "tpu").devices)
        except jax.errors.JaxRuntimeError as error:
            if "not divisible" not in str(error) or math.prod(sizes) > 8:
                raise
            bounds = (*sizes, 1, 1)[:3]  # smaller than the usual host: one host has it all
            return tuple(topologies.get_topology_desc(name, "tpu", chips_per_host_bounds=bounds).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ValueError(f"libtpu knows no topology {name!r}: {str(error).splitlines()[0]}") from None


def _of_device(chip: Chip, devices_per_chip: int) -> Chip:
    """The rates of one device where a chip shows as several."""
    if devices_per_chip <= 1:
        return chip
    n, torus = devices_per_chip, chip.interconnect
    assert isinstance(torus, Torus) and chip.memory is not None
    return dataclasses.replace(
        chip,
        flops=chip.flops / n,
        flops_8bit=chip.flops_8bit / n,
        bandwidth=chip.bandwidth / n,
        memory=chip.memory / n,
        interconnect=dataclasses.replace(torus, link_bandwidth=torus.link_bandwidth / n),
    )


@contextlib.contextmanager
def no_program_cache() -> Iterator[None]:
    """Compile afresh: programs for devices that are not there can be written to the cache but not read back."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether it is used is remembered there
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def memory_limit(topology: Topology) -> int:
    """Bytes that the compiler lets a program have on one device: less than the data sheet says.

    It is asked by a program that is certainly too large.
    """
    import jax
    import jax.numpy as jnp

    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    huge = jax.ShapeDtypeStruct((1 << 42,), jnp.int8, sharding=sharding)
    try:
        with no_program_cache():
            jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := parse_overflow(str(error))) is not None:
            return found[1]
    assert topology.chip.memory is not None
    return int(topology.chip.memory)


def parse_overflow(message: str) -> tuple[int, int] | None:
    """Bytes wanted and bytes there are, from the compiler's message about too little memory."""
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if match := re.search(pattern, message):
            wanted, unit, limit, limit_unit = match.groups()
            return int(float(wanted) * _GIB[unit]), int(float(limit) * _GIB[limit_unit])
    return None
