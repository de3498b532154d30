"""Logits of every position of a prompt, through the engine's own ragged step."""

from __future__ import annotations

import jax
import numpy as np

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.engine import Engine
from jaxllm.scheduling.plan import Chunk, IterationPlan
from jaxllm.scheduling.request import Held, Request


def engine_logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    """`[T, V]` float32, chunk by chunk over the paged cache."""
    runner, most, rows = engine.runner, engine.runner.shapes.scoring_buckets[-1], []
    request = Request("logits", tokens, SamplingParams(), limit=len(tokens))
    pages = engine.pool.allocate(engine.pool.pages_for(len(tokens))) or []
    request.held = Held(slot=runner.shapes.spare_slot, pages=pages)
    assert pages, "no room"
    head = jax.jit(lambda params, x: runner.steps.model(params).logits(x, runner.model.placement.shard))
    for start in range(0, len(tokens), most):
        chunk = Chunk(request, start, min(most, len(tokens) - start), 0)
        hidden_TD = runner.hidden_states(IterationPlan([chunk]))
        rows.append(np.asarray(head(runner.state.params, hidden_TD))[: chunk.count])
    engine.pool.free(pages)
    return np.concatenate(rows)
