"""How long collectives take at least: bytes of the whole array and an interconnect -> seconds.

`num_bytes` is V, the array before it is cut (or after it is gathered). Latency is not counted. Source: the
scaling book, "Sharded matrices" and "GPUs".

    torus (TPU ICI)   all-gather = reduce-scatter = V / (W·axes), W both ways of one axis;  all-to-all = a quarter
    node (NVLink)     all-gather = reduce-scatter = V·(n-1)/(n·W), W one way of one GPU;     all-to-all = 1/n of it
    all-reduce = reduce-scatter, then all-gather
"""

from __future__ import annotations

from jaxllm.roofline.chips import Node, Torus


def all_gather_seconds(num_bytes: float, interconnect: Torus | Node, *, num_devices: int, axes: int = 1) -> float:
    """Every device ends with all V bytes.

    Args:
        num_bytes: V.
        interconnect: what joins the devices.
        num_devices: how many take part.
        axes: axes of the torus they span, each a ring that closes on itself; a node has no axes.
    """
    if num_devices == 1:
        return 0.0
    if isinstance(interconnect, Node):
        return num_bytes * (num_devices - 1) / (num_devices * interconnect.bandwidth)
    if not 1 <= axes <= interconnect.num_axes:
        raise ValueError(f"axes={axes}; this torus has {interconnect.num_axes}")
    return num_bytes / (2 * interconnect.link_bandwidth * axes)


def reduce_scatter_seconds(num_bytes: float, interconnect: Torus | Node, *, num_devices: int, axes: int = 1) -> float:
    """Every device ends with its share of the sum: an all-gather backwards."""
    return all_gather_seconds(num_bytes, interconnect, num_devices=num_devices, axes=axes)


def all_reduce_seconds(num_bytes: float, interconnect: Torus | Node, *, num_devices: int, axes: int = 1) -> float:
    """Every device ends with the whole sum."""
    return 2 * all_gather_seconds(num_bytes, interconnect, num_devices=num_devices, axes=axes)


def all_to_all_seconds(num_bytes: float, interconnect: Torus | Node, *, num_devices: int, axes: int = 1) -> float:
    """Every device sends a different share of its V/n bytes to every other."""
    share = num_devices if isinstance(interconnect, Node) else 4
    return all_gather_seconds(num_bytes, interconnect, num_devices=num_devices, axes=axes) / share
