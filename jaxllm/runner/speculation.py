"""A decode loop whose iterations may yield several tokens per row: draft, verify, accept, all on the device.

Every position samples with its own noise, a function of (seed, position), whether a draft stands there or not; drafts
are kept as long as they are what was sampled. For drafts that are sure of themselves this is rejection sampling
(Leviathan et al. 2023): a draft `d` is accepted with probability `p(d)`, and what replaces it comes from
`norm(max(0, p - q)) = p / (1 - p(d))` elsewhere. Beyond having the target's distribution, a request's tokens are those
of plain decoding with the same seed, whatever was drafted (Daliri et al. 2024 call it drafter-invariant).

Whether an iteration verifies drafts or decodes one token per row is decided by what it would cost and what it would
bring: expected tokens per iteration with acceptance `a` and `g` drafts are `(1 - a^(g+1)) / (1 - a)`.

Dimension letters: R rows, J = g + 1 tokens per row, S slots, L positions, M pages per row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.runner import sampler as sampling
from jaxllm.runner.batch import Drafting, RowBatch
from jaxllm.runner.draft_model import CATCH_UP, LOOK_EVERY, Drafter, forward_chunks, written
from jaxllm.runner.prompt_lookup import look_up
from jaxllm.runner.steps import Pages, SlotState, Steps, empty_samples, is_active

_SURE = 0.95  # that a text that must come is cut into tokens as a tokenizer would
_MEMORY = 0.85  # of the hit rate, per drafted token that was seen to be right or wrong


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Speculated:
    """What a loop sampled: `[steps * J, R]` each, J entries for every iteration, `IDLE` where there is no token.

    `drafted` int32 `[steps, R]`: how many drafts each row had verified.
    """

    sampled: sampling.Sampled
    drafted: jax.Array


def speculating_loop(
    steps: Steps,
    params: Any,
    pages: Pages,
    state: SlotState,
    draft_pages: Pages,
    batch: RowBatch,
    table_RM: jax.Array,
    num_steps: jax.Array,
    drafting: Drafting,
) -> tuple[Pages, SlotState, Pages, Speculated]:
    """Up to `num_steps` iterations of one or more tokens per row; as `Steps.decode_loop`."""
    speculation = steps.speculation
    assert speculation is not None
    num_rows, width = batch.slot.shape[0], speculation.num_speculative_tokens + 1
    drafter = Drafter(steps, params, batch, table_RM)

    def one_step(carry):
        i, pages, state, draft_pages, out, drafted = carry
        length, active = state.length[batch.slot], is_active(state, batch)
        most = jnp.where(active, jnp.minimum(drafting.most, batch.limit - length - 1), 0)
        kind = jnp.ones(num_rows, jnp.int32)  # of draft: 0 where a single token matched, which says little
        is_given, found = drafting.is_given, jnp.where(drafting.is_given, 0, most)
        if steps.draft is None:
            drafts_RG, found, matched = look_up(state.history, batch.slot, length, found, speculation)
            kind = jnp.where(~is_given & (matched == 1), 0, kind)
        else:
            # Whether to draft is known before: a draft model's tokens cost, and what it missed it can read later.
            hopes = _expected(state.hit_rate[batch.slot, kind], drafting.num_sure, found, width - 1)
            worth = jnp.sum(hopes) > drafting.price * jnp.sum(active)
            looks = ~worth & jnp.any(active & (length % LOOK_EVERY == 0))
            draft_pages, drafts_RG = drafter.first(draft_pages, state, jnp.where(worth, found, 0))
            draft_pages, seen_RG = drafter.first(draft_pages, state, jnp.where(looks, found, 0), CATCH_UP)
            found, drafts_RG = jnp.where(worth | looks, found, 0), jnp.where(looks, seen_RG, drafts_RG)
        drafts_RG = jnp.where(is_given[:, None], drafting.given, drafts_RG)
        count = jnp.where(is_given & (i == 0), most, found)  # what was given says nothing of later iterations
        expected = _expected(state.hit_rate[batch.slot, kind], drafting.num_sure, count, width - 1)
        observed = jnp.where(drafting.num_sure > 0, 0, count)
        verify = jnp.sum(expected) > drafting.price * jnp.sum(active)

        def several(carry):
            pages, state, draft_pages, _ = carry
            drafts = drafts_RG
            if steps.draft is not None:
                draft_pages, drafts = drafter.others(draft_pages, state, drafts_RG, found)
                drafts = jnp.where(is_given[:, None], drafting.given, drafts)
            pages, state, sampled, hits = _verify(steps, params, pages, state, batch, table_RM, drafts, count)
            state = _observe(state, (batch.slot, kind), hits, observed, width - 1)
            return pages, state, draft_pages, sampled

        def single(carry):
            pages, state, draft_pages, wide = carry
            pages, state, sampled = steps.decode_step(params, pages, state, batch, table_RM)
            is_hit = (sampled.tokens == drafts_RG[:, 0]).astype(jnp.int32)
            state = _observe(state, (batch.slot, kind), is_hit, observed, 1)
            return pages, state, draft_pages, jax.tree.map(lambda all_J, one: all_J.at[0].set(one), wide, sampled)

        # Loops of one round or none: unlike branches of `lax.cond`, they surely update the pages in place.
        wide = empty_samples(width, num_rows, with_logprobs=batch.sampling is not None)
        carry = (list(pages), state, list(draft_pages), wide)
        carry = jax.lax.fori_loop(0, verify.astype(jnp.int32), lambda _, c: several(c), carry)
        carry = jax.lax.fori_loop(verify.astype(jnp.int32), 1, lambda _, c: single(c), carry)
        pages, state, draft_pages, wide = carry
        out = jax.tree.map(lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, i * width, 0), out, wide)
        return i + 1, pages, state, draft_pages, out, drafted.at[i].set(jnp.where(verify, count, 0))

    def more(carry) -> jax.Array:
        i, _, state, *_ = carry
        return (i < num_steps) & jnp.any(is_active(state, batch))

    out = empty_samples(steps.max_steps * width, num_rows, with_logprobs=batch.sampling is not None)
    drafted = jnp.zeros((steps.max_steps, num_rows), jnp.int32)
    carry = (jnp.int32(0), list(pages), state, list(draft_pages), out, drafted)
    _, pages, state, draft_pages, out, drafted = jax.lax.while_loop(more, one_step, carry)
    return pages, state, draft_pages, Speculated(out, drafted)


def _verify(
    steps: Steps,
    params: Any,
    pages: Pages,
    state: SlotState,
    batch: RowBatch,
    table_RM: jax.Array,
    drafts_RG: jax.Array,
    count: jax.Array,
) -> tuple[list[Any], SlotState, sampling.Sampled, jax.Array]:
    """One iteration over each row's last token and its drafts.

    Samples `[J, R]`, idle after the first that differs, and how many drafts were right `[R]`.
    """
    (num_rows, num_drafts), slot = drafts_RG.shape, batch.slot
    width, spare, j = num_drafts + 1, state.done.shape[0] - 1, jnp.arange(num_drafts + 1)
    length, active = state.length[slot], is_active(state, batch)
    position_RJ = length[:, None] - 1 + j
    is_real_RJ = active[:, None] & (j <= count[:, None])
    # Written first and read back: who still read the histories as they were would have all of them copied.
    state = written(state, slot, position_RJ[:, 1:], drafts_RG, is_real_RJ[:, 1:])
    tokens_RJ = state.history[slot[:, None], position_RJ]
    x_TD, pages = forward_chunks(
        steps, params, pages, tokens_RJ, position_RJ, is_real_RJ, table_RM, state.adapter[slot]
    )
    logits_TV = steps.model(params).logits(x_TD, steps.placement.fitted(num_rows * width).shard)
    sampled = steps.sampled(logits_TV, state, batch, position_RJ.reshape(-1) + 1)

    sampled_RJ = sampled.tokens.reshape(num_rows, width)
    is_hit = (sampled_RJ[:, :-1] == drafts_RG) & (j[:-1] < count[:, None])
    hits = jnp.sum(jnp.cumprod(is_hit, axis=1), axis=1)
    ends_RJ = jnp.any(sampled_RJ[:, :, None] == batch.stop_ids[:, None, :], axis=2) | (
        sampled_RJ == sampling.NOT_FINITE
    )
    before = jnp.cumsum(ends_RJ, axis=1) - ends_RJ
    kept_RJ = active[:, None] & (j <= hits[:, None]) & (before == 0)
    state = written(state, slot, position_RJ + 1, jnp.maximum(sampled_RJ, 0), kept_RJ)
    at = jnp.where(active, slot, spare)
    state = dataclasses.replace(
        state,
        length=state.length.at[at].add(jnp.sum(kept_RJ, axis=1)),
        done=state.done.at[at].max(jnp.any(kept_RJ & ends_RJ, axis=1)),
    )
    sampled = dataclasses.replace(sampled, tokens=jnp.where(kept_RJ, sampled_RJ, sampling.IDLE).reshape(-1))
    sampled = jax.tree.map(lambda a: jnp.swapaxes(a.reshape(num_rows, width, *a.shape[1:]), 0, 1), sampled)
    return pages, state, sampled, hits


def _expected(rate: jax.Array, num_sure: jax.Array, count: jax.Array, num_drafts: int) -> jax.Array:
    """Drafts that will be accepted: `a + a^2 + ... + a^count`, where `a` is `_SURE` for the first `num_sure`."""
    j = jnp.arange(num_drafts)
    together = jnp.cumprod(jnp.where(j < num_sure[:, None], _SURE, rate[:, None]), axis=1)
    return jnp.sum(jnp.where(j < count[:, None], together, 0.0), axis=1)


def _observe(
    state: SlotState, at: tuple[jax.Array, jax.Array], hits: jax.Array, count: jax.Array, seen: int
) -> SlotState:
    """Remember how drafts did: the first `hits` of `count` were right, the one after them wrong, the rest unknown.

    `at`: slots and kinds of draft, `[R]` each.

    A plain iteration shows (`seen`) what would have become of the first.
    """
    trials = jnp.minimum(jnp.minimum(hits + 1, count), seen)
    keep = _MEMORY**trials
    rate = state.hit_rate[at]
    rate = keep * rate + (1 - keep) * jnp.minimum(hits, trials) / jnp.maximum(trials, 1)
    return dataclasses.replace(state, hit_rate=state.hit_rate.at[at].set(rate))
