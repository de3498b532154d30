"""Chips as data: peak rates, memory and interconnect from the data sheets, and the host CPU as measured.

A name or a JAX device kind -> `Chip`. Rates are dense (no sparsity). Importing it loads no JAX.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GB, TB, TFLOP = 1e9, 1e12, 1e12

# Links between hosts and chips, bytes per second one way.
PCIE_GEN4, PCIE_GEN5 = 32 * GB, 64 * GB
INFINIBAND_HDR, INFINIBAND_NDR = 25 * GB, 50 * GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Torus:
    """TPU chips in a 2-D or 3-D torus (ICI): `num_links` links of `link_bandwidth` bytes/s one way, two per axis."""

    link_bandwidth: float
    num_links: int

    @property
    def num_axes(self) -> int:
        """Directions in which a chip has neighbours on both sides."""
        return self.num_links // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """GPUs behind a switch (NVLink): each sends and receives `bandwidth` bytes/s one way, whoever the peer is."""

    bandwidth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One device: rates per second, memory in bytes; None where there is nothing to say."""

    name: str
    title: str
    flops: float  # multiply and add counted as two, 16-bit operands
    flops_8bit: float
    bandwidth: float
    memory: float | None
    interconnect: Torus | Node | None = None
    dcn_bandwidth: float | None = None  # between slices or nodes, one way, per chip

    @property
    def ridge(self) -> float:
        """FLOPs per byte at which compute and memory take equally long."""
        return self.flops / self.bandwidth


def _tpu(
    name: str,
    title: str,
    flops: float,
    eight: float,
    gigabytes: float,
    terabytes: float,
    link: float,
    num_links: int,
    dcn: float,
) -> Chip:
    return Chip(
        name=name,
        title=title,
        flops=flops * TFLOP,
        flops_8bit=eight * TFLOP,
        memory=gigabytes * GB,
        bandwidth=terabytes * TB,
        interconnect=Torus(link_bandwidth=link * GB, num_links=num_links),
        dcn_bandwidth=dcn * GB,
    )


def _gpu(name: str, title: str, flops: float, eight: float, gigabytes: float, terabytes: float, nvlink: float) -> Chip:
    return Chip(
        name=name,
        title=title,
        flops=flops * TFLOP,
        flops_8bit=eight * TFLOP,
        memory=gigabytes * GB,
        bandwidth=terabytes * TB,
        interconnect=Node(bandwidth=nvlink * GB),
        dcn_bandwidth=INFINIBAND_HDR if name == "a100" else INFINIBAND_NDR,
    )


# fmt: off
CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    #                             bf16  8-bit   GB  TB/s  one way GB/s per link, links, DCN
    _tpu("v4", "TPU v4",           275,  275,   32, 1.2,   45, 6, 6.25),
    _tpu("v5e", "TPU v5e",         197,  394,   16, 0.819, 45, 4, 3.1),
    _tpu("v5p", "TPU v5p",         459,  918,   95, 2.77,  90, 6, 6.25),
    _tpu("v6e", "TPU v6e",         918, 1836,   32, 1.6,   90, 4, 12.5),
    _tpu("v7", "TPU v7",          2307, 4614,  192, 7.37, 100, 6, 6.25),  # 1.2 TB/s both ways over six links
    #                                bf16  8-bit   GB   TB/s  one way GB/s
    _gpu("a100", "NVIDIA A100-80G",   312,  624,   80,  2.0,  300),
    _gpu("h100", "NVIDIA H100 SXM",   990, 1979,   80,  3.35, 450),
    _gpu("h200", "NVIDIA H200",       990, 1979,  141,  4.8,  450),
    _gpu("b200", "NVIDIA B200",      2250, 4500,  192,  8.0,  900),
)}
# fmt: on

# What JAX calls the devices whose data sheet is above. A device of TPU v7 is half a chip, an H100 PCIe or an
# A100-40G another one: they are measured instead of guessed.
_DEVICE_KINDS = (
    (r"TPU v4", "v4"),
    (r"TPU v5 ?lite|TPU v5e", "v5e"),
    (r"TPU v5p?", "v5p"),
    (r"TPU v6 ?lite|TPU v6e", "v6e"),
    (r"NVIDIA A100-SXM\d-80GB", "a100"),
    (r"NVIDIA H100 80GB HBM3", "h100"),
    (r"NVIDIA H200", "h200"),
    (r"NVIDIA B200", "b200"),
)


def find_chip(name: str) -> Chip:
    """A chip by name (`h100`, `tpu-v5e`), or `cpu`, which is measured. Raises ValueError naming those there are."""
    key = re.sub(r"^(tpu|nvidia)[-_ ]?|[-_ ]?(sxm\d?|80g|80gb)$", "", name.strip().lower())
    if key in ("cpu", "host"):
        return measure_device()
    if key not in CHIPS:
        raise ValueError(f"no chip {name!r}; use one of {', '.join(CHIPS)}, or cpu (measured here)")
    return CHIPS[key]


def chip_of_device(device_kind: str) -> Chip | None:
    """The data sheet of a JAX device kind, or None where it must be measured."""
    for pattern, name in _DEVICE_KINDS:
        if re.fullmatch(pattern, device_kind, re.IGNORECASE):
            return CHIPS[name]
    return None


def measure_device(dtype: str = "bfloat16", *, device: Any = None, between: Callable[[], None] = lambda: None) -> Chip:
    """Measure a device's copy bandwidth and GEMM rate, in under a second on a CPU. The default is the host CPU.

    `between` is called between two runs, a few milliseconds apart on a CPU: what it raises ends the measurement.

    Copy: an array updated in place, read and written once. GEMM: square, accumulated in float32. The best of a
    few runs of each, since whatever else runs on the machine can only slow them down.
    """
    import jax
    import jax.numpy as jnp

    device = device or jax.devices("cpu")[0]
    on_cpu = device.platform == "cpu"
    width, length = (1024, 1 << 25) if on_cpu else (8192, 1 << 28)
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    product = jax.jit(lambda a: jnp.einsum("ij,jk->ik", a, a, preferred_element_type=jnp.float32))
    with jax.default_device(device):
        copy_s = _best_seconds(increment, jnp.zeros(length, jnp.float32), between)
        square = jnp.ones((width, width), dtype)
        gemm_s = _best_seconds(lambda _: product(square), None, between)
    flops = 2 * width**3 / gemm_s
    return Chip(
        name="cpu" if on_cpu else device.device_kind,
        title="host CPU (measured)" if on_cpu else f"{device.device_kind} (measured)",
        flops=flops,
        flops_8bit=flops,
        bandwidth=2 * 4 * length / copy_s,
        memory=None,
    )


def _best_seconds(step: Callable[[Any], Any], value: Any, between: Callable[[], None], budget_s: float = 0.2) -> float:
    """Least time of one call, each fed what the one before gave, after one that compiles."""
    value = step(value).block_until_ready()
    best, deadline = float("inf"), time.perf_counter() + budget_s
    while time.perf_counter() < deadline:
        between()
        started = time.perf_counter()
        value = step(value).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best
