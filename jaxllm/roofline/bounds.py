"""Lower bounds of one iteration on one device, term by term: what it reads, multiplies and sends -> milliseconds.

`max(KV/W + max(FLOPs/C, weights/W), interconnect)`: attention waits for memory, the matrices for memory or the
multipliers, and collectives are taken to overlap with both. Source: the scaling book, "All the transformer
inference you need". Plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxllm.roofline.chips import Chip, Torus
from jaxllm.roofline.collective_time import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    reduce_scatter_seconds,
)


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective of a program: the bytes each device ends with, and how many devices take part."""

    kind: str
    num_bytes: int
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWork:
    """What one device does in one iteration."""

    weight_bytes: float
    kv_bytes: float
    flops: float
    collectives: tuple[Collective, ...] = ()


def lower_bound(work: DeviceWork, chip: Chip, *, eight_bit: bool = False) -> dict[str, Any]:
    """`{"ms", "bound_by", "terms_ms"}`; `bound_by` is the largest of weights, KV, FLOPs and interconnect."""
    terms = {
        "weights": work.weight_bytes / chip.bandwidth,
        "KV": work.kv_bytes / chip.bandwidth,
        "FLOPs": work.flops / (chip.flops_8bit if eight_bit else chip.flops),
        "interconnect": collective_seconds(work.collectives, chip),
    }
    seconds = max(terms["KV"] + max(terms["FLOPs"], terms["weights"]), terms["interconnect"])
    return {
        "ms": 1e3 * seconds,
        "bound_by": max(terms, key=terms.__getitem__),
        "terms_ms": {name: 1e3 * value for name, value in terms.items()},
    }


def collective_seconds(collectives: Iterable[Collective], chip: Chip) -> float:
    """Time on the links alone: every axis of a torus in use, both ways, no latency."""
    link = chip.interconnect
    if link is None:
        return 0.0
    total = 0.0
    for c in collectives:
        axes = link.num_axes if isinstance(link, Torus) and c.group_size >= 4 else 1
        whole = c.num_bytes * c.group_size
        if c.kind == "all-reduce":
            total += all_reduce_seconds(c.num_bytes, link, num_devices=c.group_size, axes=axes)
        elif c.kind == "all-gather":
            total += all_gather_seconds(c.num_bytes, link, num_devices=c.group_size, axes=axes)
        elif c.kind == "reduce-scatter":
            total += reduce_scatter_seconds(whole, link, num_devices=c.group_size, axes=axes)
        elif c.kind == "all-to-all":
            total += all_to_all_seconds(whole, link, num_devices=c.group_size, axes=axes)
        elif c.group_size > 1:  # a permute: one hop
            total += c.num_bytes / (link.link_bandwidth if isinstance(link, Torus) else link.bandwidth)
    return total
