"""Logits of every position of a prompt, through the engine's own ragged step."""

from __future__ import annotations

import jax
import numpy as np

from jaxllm import LLM
from jaxllm.runner.batch import RaggedBatch
from jaxllm.runner.steps import SlotState


def engine_logits(llm: LLM, tokens: list[int]) -> np.ndarray:
    """`[T, V]` float32: one ragged step over the whole prompt with every position sampled (T <= max_num_seqs)."""
    runner, length = llm.engine.runner, len(tokens)
    shapes, programs = runner.shapes, runner.programs
    rows = shapes.max_num_seqs
    assert length <= rows, "raise max_num_seqs to take logits of so many positions"

    def padded(values: list[int], size: int) -> np.ndarray:
        return np.array(values + [0] * (size - len(values)), np.int32)

    num_pages = -(-length // shapes.page_size)
    table = np.zeros((rows, shapes.pages_per_row), np.int32)
    table[0, :num_pages] = np.arange(1, num_pages + 1)
    history = np.zeros((rows + 1, shapes.max_model_len), np.int32)
    history[0, :length] = tokens
    batch = RaggedBatch(
        token_row=padded([0] * length, rows), token_position=padded(list(range(length)), rows),
        num_tokens=np.int32(length), slot=padded([0], rows), q_start=padded([0], rows), q_len=padded([length], rows),
        kv_len=padded([length], rows), num_single=np.int32(length == 1), page_table=table,
        sample_at=padded(list(range(length)), rows),
    )  # fmt: skip
    state = SlotState(history, np.zeros(rows + 1, bool))  # type: ignore[arg-type]

    @jax.jit
    def logits(params, pages):
        hidden, _ = programs.ragged_step(params, pages, state, batch)
        return programs._model(params).logits(hidden, runner.model.placement.shard)

    return np.asarray(logits(runner._params, runner._pages))[:length]
