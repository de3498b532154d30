"""How long one iteration lasts: what it does on each replica -> seconds, from a chip's figures and a model's costs.

    seconds = max(matrices' FLOPs / C, weights / W)                  products: by the multipliers or by memory
            + max(pairs' FLOPs / C, keys / W) of the prompt chunks   attention, apart for chunks
            + max(pairs' FLOPs / C, keys / W) of the decodes         and for rows of one query
            + 2L all-reduces of [T, D], each with a latency          tensor parallelism (megatron rules)

C and W are peaks times what kernels reach of them. Nothing overlaps but what a kernel overlaps itself, so this is an
estimate above the lower bound of `jaxllm.roofline.bounds`. Plain Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxllm.roofline.bounds import Collective, collective_seconds
from jaxllm.roofline.chips import Chip
from jaxllm.roofline.cost_model import ModelCost

RAGGED, DECODE, LOOP = "ragged", "decode", "loop"


@dataclass(frozen=True, slots=True)
class IterationWork:
    """What one replica does in one iteration.

    Attributes:
        program: `RAGGED`, `DECODE`, or `LOOP` for one step of a decode loop.
        tokens: that go through the model. samples: rows that sample.
        chunk_pairs, chunk_keys: (query, key) pairs and keys of prompt chunks, summed over layers.
        decode_keys: those of rows of one query, for which pairs and keys are the same.
        admitted: requests that are new to their slots.
    """

    program: str
    tokens: int
    samples: int
    chunk_pairs: float
    chunk_keys: float
    decode_keys: float
    admitted: int = 0


class IterationTime(Protocol):
    """Seconds of an iteration on one replica; linear in `decode_keys` where nothing else changes."""

    def seconds(self, work: IterationWork) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What kernels reach of a data sheet, and what an iteration costs beside them.

    The shares are those measured elsewhere on an H100 (matrix products 76% of peak, memory 75 to 80%).

    Attributes:
        compute: share of the peak FLOP/s.
        memory: share of the peak bandwidth.
        collective_s: latency of one collective, above its bytes.
        host_s: host time of one iteration: planning and dispatch. Hidden behind the device where that takes longer.
    """

    compute: float = 0.76
    memory: float = 0.78
    collective_s: float = 10e-6
    host_s: float = 1e-3


DATA_SHEET = Efficiency()


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineTime:
    """From data sheets; see the head of this file.

    Attributes:
        cost: of one replica's model, bytes over its devices together.
        chip: one device.
        num_layers, hidden_size: for the collectives.
        tp: devices of the replica.
        eight_bit: products run at the chip's 8-bit rate.
        efficiency: what is reached of the chip's figures.
    """

    cost: ModelCost
    chip: Chip
    num_layers: int
    hidden_size: int
    tp: int = 1
    eight_bit: bool = False
    efficiency: Efficiency = DATA_SHEET

    def seconds(self, work: IterationWork) -> float:
        """See `IterationTime`."""
        cost, chip, reached = self.cost, self.chip, self.efficiency
        flops_per_s = self.tp * reached.compute * (chip.flops_8bit if self.eight_bit else chip.flops)
        attention_flops_per_s = self.tp * reached.compute * chip.flops
        bytes_per_s = self.tp * reached.memory * chip.bandwidth
        products = cost.cost(tokens=work.tokens, samples=work.samples, pairs=0, keys=0)
        seconds = products.seconds(flops_per_s, bytes_per_s)
        for pairs, keys in ((work.chunk_pairs, work.chunk_keys), (work.decode_keys, work.decode_keys)):
            seconds += max(cost.pair_flops * pairs / attention_flops_per_s, cost.kv_bytes * keys / bytes_per_s)
        return seconds + self._collectives(work.tokens)

    def _collectives(self, tokens: int) -> float:
        if self.tp == 1:
            return 0.0
        each = Collective("all-reduce", 2 * tokens * self.hidden_size, self.tp)
        return 2 * self.num_layers * (collective_seconds((each,), self.chip) + self.efficiency.collective_s)
