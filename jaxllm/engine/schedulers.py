"""The schedulers of an engine: one for each of its page pools."""

from __future__ import annotations

import functools

from jaxllm.runner.interface import Memory
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.scheduling.adapter_slots import AdapterSlots
from jaxllm.scheduling.guesses import guess
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.scheduler import Scheduler


def schedulers_for(
    memory: Memory, shapes: RunnerShapes, *, chunked_prefill: bool = True, pace: Pace | None = None
) -> list[Scheduler]:
    """A scheduler for each of the memory's page pools; they share the slots of adapters and the pace."""
    adapter_slots = AdapterSlots(shapes.max_loras)
    speculation, drafts = shapes.speculation, None
    if speculation is not None:
        lengths = {"shortest": speculation.shortest_lookup, "longest": speculation.longest_lookup}
        drafts = functools.partial(guess, **lengths)
    return [
        Scheduler(
            pool,
            max_num_seqs=shapes.max_num_seqs,
            max_num_batched_tokens=shapes.max_num_batched_tokens,
            max_decode_steps=shapes.max_decode_steps,
            first_slot=replica * shapes.max_num_seqs,
            first_page=replica * shapes.num_pages,
            tiers=memory.tiers,
            chunked_prefill=chunked_prefill,
            num_drafts=shapes.num_drafts,
            max_drafting_rows=shapes.speculating_rows,
            guess=drafts,
            adapter_slots=adapter_slots,
            pace=pace,
        )
        for replica, pool in enumerate(memory.pools)
    ]
