"""Drafts of a second, smaller decoder: a few tokens per row, one after the other, over pages of its own.

It samples each position with the noise with which the target will, so that both agree where their distributions do (at
least `(1 - d) / (1 + d)` of the time for a total variation `d`: Daliri et al. 2024); greedily where the target is. Its
pages have the numbers of the target's. It may have missed the last token but one (when every draft was right), so it
begins with two, or with as many as pass between two looks while its drafts are not worth verifying; where a prompt's
step comes in between, some stay missing. What it gets wrong changes no answer.

Dimension letters: R rows, J tokens per row, G drafts, S slots, M pages per row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.kv.layout import page_size_of
from jaxllm.ops.attention import RaggedRows
from jaxllm.runner.batch import RowBatch
from jaxllm.runner.steps import Pages, SlotState, Steps, cache_slots

LOOK_EVERY = 6  # tokens: while drafts do not pay, how often the draft model sees whether they would
CATCH_UP = LOOK_EVERY + 2  # tokens that it then reads: those since the last look, and what that may have missed


@dataclass(frozen=True, slots=True)
class Drafter:
    """The draft model of `steps`, for the rows of one loop."""

    steps: Steps
    params: Any
    batch: RowBatch
    table_RM: jax.Array

    def first(
        self, pages: Pages, state: SlotState, most: jax.Array, num_tokens: int = 2
    ) -> tuple[list[Any], jax.Array]:
        """The first draft of the rows that may have any (`most > 0`), in `[R, G]`; the others are not known yet.

        The last `num_tokens` of each row are read, or as many as it has.
        """
        assert self.steps.speculation is not None
        slot, num_drafts = self.batch.slot, self.steps.speculation.num_speculative_tokens
        length = state.length[slot][:, None]
        position = jnp.maximum(length - num_tokens, 0) + jnp.arange(num_tokens)
        valid = (most[:, None] > 0) & (position < length)

        def one(_: jax.Array, carry: tuple[list[Any], jax.Array]) -> tuple[list[Any], jax.Array]:
            pages, drafts_RG = carry
            tokens = state.history[slot[:, None], position]
            pages, draft = self._next(pages, state, tokens, position, valid)
            return pages, drafts_RG.at[:, 0].set(draft)

        nothing: tuple[list[Any], jax.Array] = list(pages), jnp.zeros((slot.shape[0], num_drafts), jnp.int32)
        pages, drafts_RG = jax.lax.fori_loop(0, jnp.any(most > 0).astype(jnp.int32), one, nothing)
        return list(pages), drafts_RG

    def others(
        self, pages: Pages, state: SlotState, drafts_RG: jax.Array, count: jax.Array
    ) -> tuple[list[Any], jax.Array]:
        """What comes after the first, up to `count` of each row."""
        slot = self.batch.slot
        length = state.length[slot]

        def one(j: jax.Array, carry: tuple[list[Any], SlotState, jax.Array]):
            pages, state, drafts_RG = carry
            position, valid = (length + j - 1)[:, None], (j < count)[:, None]
            tokens = drafts_RG[:, j - 1, None]
            state = written(state, slot, position, tokens, valid)  # penalties look at it
            pages, draft = self._next(pages, state, tokens, position, valid)
            return pages, state, drafts_RG.at[:, j].set(draft)

        pages, _, drafts_RG = jax.lax.fori_loop(1, drafts_RG.shape[1], one, (list(pages), state, drafts_RG))
        return list(pages), drafts_RG

    def _next(
        self, pages: Pages, state: SlotState, tokens_RJ: jax.Array, position_RJ: jax.Array, valid_RJ: jax.Array
    ) -> tuple[list[Any], jax.Array]:
        """Compute tokens, and sample one after each row's last."""
        steps, draft, batch = self.steps, self.steps.draft, self.batch
        assert draft is not None
        params, (num_rows, width) = steps.draft_params(self.params), tokens_RJ.shape
        x_TD, pages = forward_chunks(draft, params, pages, tokens_RJ, position_RJ, valid_RJ, self.table_RM)
        last_R = jnp.maximum(jnp.sum(valid_RJ, axis=1) - 1, 0)
        x_RD = x_TD.reshape(num_rows, width, -1)[jnp.arange(num_rows), last_R]
        logits_RV = draft.model(params).logits(x_RD, draft.placement.fitted(num_rows).shard)
        if batch.sampling is not None:  # nobody asks for a draft's logprobs
            quiet = dataclasses.replace(batch.sampling, num_logprobs=jnp.full(num_rows, -1))
            batch = dataclasses.replace(batch, sampling=quiet)
        sampled = steps.sampled(logits_RV, state, batch, position_RJ[:, 0] + last_R + 1)
        return pages, jnp.maximum(sampled.tokens, 0)


def forward_chunks(
    steps: Steps,
    params: Any,
    pages: Pages,
    tokens_RJ: jax.Array,
    position_RJ: jax.Array,
    valid_RJ: jax.Array,
    table_RM: jax.Array,
    adapter_R: jax.Array | None = None,
) -> tuple[jax.Array, list[Any]]:
    """One forward over the first valid tokens of each row: hidden states `[R * J, D]`, and the pages."""
    (num_rows, width), sections = tokens_RJ.shape, steps.placement.parts("pages")
    count, valid, position = jnp.sum(valid_RJ, axis=1), valid_RJ.reshape(-1), position_RJ.reshape(-1)
    row = jnp.repeat(jnp.arange(num_rows), width)
    targets = cache_slots(table_RM, row, position, valid, page_size_of(pages[0]))
    rows = RaggedRows(
        q_start=jnp.arange(num_rows) % (num_rows // sections) * width,
        q_len=count,
        kv_len=jnp.where(count > 0, position_RJ[:, 0] + count, 0),
        num_single=jnp.zeros(sections, jnp.int32),
        page_table=table_RM,
    )
    backend = dataclasses.replace(steps.backend, query_tile=min(steps.backend.query_tile, width))
    steps = dataclasses.replace(steps, backend=backend)
    adapter_T = None if adapter_R is None else jnp.repeat(adapter_R, width)
    return steps.forward(params, pages, tokens_RJ.reshape(-1), position, targets, rows, adapter_T)


def written(state: SlotState, slot: jax.Array, position_RJ: jax.Array, tokens_RJ: jax.Array, real_RJ) -> SlotState:
    """Tokens into the histories; what is not real goes to the spare slot."""
    at = jnp.where(real_RJ, slot[:, None], state.done.shape[0] - 1)
    history = state.history.at[at, position_RJ].set(tokens_RJ, mode="drop")
    return dataclasses.replace(state, history=history)
