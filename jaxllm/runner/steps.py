"""The compiled programs: ragged step, sampling step and decode loop, as pure functions over arrays.

Parameters, pages, per-slot state and one batch -> tokens, and the new pages and state (both donated). Programs
grow as a sum: the ragged step is compiled per token bucket, sampling and the decode loop per row bucket.

Tokens, rows and pages come in sections, one per data-parallel replica; only the cache writes and attention, which
run on each device by itself, look at one section at a time.

Dimension letters: T tokens, R rows, M pages per row, D model width, V vocabulary, S slots, L positions, G slots
set together, J = 1 + drafts per row, W words of a bit mask.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxllm.adapters.product import Slots, slotted_product
from jaxllm.config import ModelConfig, SpeculativeConfig
from jaxllm.kv.layout import page_size_of, page_specs, query_dims
from jaxllm.kv.memory import write_pages
from jaxllm.models.decoder import Context, Decoder
from jaxllm.models.primitives import plain_product
from jaxllm.ops.attention import XLA, AttentionBackend, AttentionSpec, RaggedRows, SingleRows, attention
from jaxllm.ops.attention.ring import RingBatch, ring_attention, zigzag
from jaxllm.runner import sampler as sampling
from jaxllm.runner.batch import RaggedBatch, RowBatch
from jaxllm.sharding.mesh import Placement

Pages = Sequence[Any]  # per layer an array, or a pytree of arrays
Rows = RaggedRows | SingleRows | RingBatch
FIRST_HIT_RATES = 0.3, 0.6  # of drafts of a request of which nothing is known: after one token that matched, after more


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SlotState:
    """What the device remembers of every running request; the last slot is spare and belongs to padding.

    Attributes:
        history: int32 `[S + 1, L]`, the tokens of the sequence: prompt, then samples as they come.
        length: int32 `[S + 1]`, how many there are. The host knows it only once it has read what was sampled.
        done: bool `[S + 1]`, a stop token was sampled: iterations already in flight must leave it alone.
        adapter: int32 `[S + 1]`, the slot of each request's adapter; 0: none.
        allowed: int32 `[S + 1, J, W]`, the bit masks of the next token and of those after each of its J - 1 drafts,
            for requests that have a constraint.
        hit_rate: float32 `[S + 1, 2]`, share of recent drafted tokens that were right, after a match of one token and
            after better ones (see `speculation`).
    """

    history: jax.Array
    length: jax.Array
    done: jax.Array
    adapter: jax.Array
    allowed: jax.Array
    hit_rate: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Weights:
    """Leaves of the parameters, whose list it stands for, with the adapters in their slots beside them."""

    leaves: Any
    adapters: Mapping[str, Slots]

    def __getitem__(self, part: slice) -> Any:
        return self.leaves[part]


@dataclass(frozen=True, slots=True)
class Steps:
    """The functions to compile for one model on one placement.

    Parameters come as plain leaves: flattening the module tree again at every dispatch would cost the host more
    than everything else it does.
    """

    cfg: ModelConfig
    graph: Any
    params_tree: Any
    placement: Placement
    residual_dtype: jnp.dtype
    max_steps: int
    backend: AttentionBackend = XLA
    longest: int | None = None  # tokens of the longest sequence
    speculation: SpeculativeConfig | None = None
    draft: Steps | None = None  # those of the model that guesses ahead; its parameters come after this one's

    def ragged_step(
        self, params: Any, pages: Pages, state: SlotState, draft_pages: Pages, batch: RaggedBatch
    ) -> tuple[jax.Array, Pages, Pages]:
        """One forward over a flat batch: hidden states of the sampling rows `[R, D]`, and the pages of both models."""
        # A row may end before where the host, which had not read all yet, took it to end at the latest.
        ahead = jnp.maximum(batch.kv_len - state.length[batch.slot], 0)
        row, kv_len = batch.token_row, batch.kv_len - ahead
        position = batch.token_position - ahead[row]
        rows = RaggedRows(batch.q_start, batch.q_len, kv_len, batch.num_single, batch.page_table)
        per_section = position.shape[0] // batch.num_tokens.size
        valid = (jnp.arange(per_section) < batch.num_tokens[..., None]).reshape(-1)
        sample_at, ring = batch.sample_at, self.placement.ring_size()
        if is_cut := ring > 1 and per_section % (2 * ring) == 0:
            order = zigzag(position.shape[0], ring, batch.num_tokens.size)
            position, row, valid = position[order], row[order], valid[order]
            sample_at = jnp.asarray(np.argsort(order))[sample_at]
        targets = cache_slots(batch.page_table, row, position, valid, page_size_of(pages[0]))
        tokens = state.history[batch.slot[row], position]
        owners = RingBatch(rows, jnp.where(valid, row, -1), position) if is_cut else rows
        adapter_T = state.adapter[batch.slot[row]]
        x_TD, pages = self.forward(params, pages, tokens, position, targets, owners, adapter_T)
        if self.draft is not None:
            of_draft = self.draft_params(params)
            _, draft_pages = self.draft.forward(of_draft, draft_pages, tokens, position, targets, owners)
        return x_TD[sample_at], pages, draft_pages

    def sample_step(
        self, params: Any, hidden_RD: jax.Array, state: SlotState, batch: RowBatch
    ) -> tuple[SlotState, sampling.Sampled]:
        """LM head and sampler on the first rows of `hidden_RD`; the tokens go into the state and out."""
        num_rows, sections = batch.slot.shape[0], self.placement.parts("pages")
        hidden_RD = hidden_RD.reshape(sections, -1, hidden_RD.shape[1])[:, : num_rows // sections]
        hidden_RD = hidden_RD.reshape(num_rows, -1)
        logits_RV = self.model(params).logits(hidden_RD, self.placement.fitted(num_rows).shard)
        active = batch.slot < state.done.shape[0] - 1
        return self._sample_and_store(logits_RV, state, batch, active)

    def decode_loop(
        self, params: Any, pages: Pages, state: SlotState, batch: RowBatch, table_RM: jax.Array, num_steps: jax.Array
    ) -> tuple[Pages, SlotState, sampling.Sampled]:
        """Up to `num_steps` iterations of one token per row; rows that stop stay idle, all idle ends the loop.

        Returns samples with a leading step dim `[max_steps, R]`; tokens are -1 where a row was idle.
        """

        def one_step(carry):
            i, pages, state, out = carry
            pages, state, sampled = self.decode_step(params, pages, state, batch, table_RM)
            out = jax.tree.map(lambda all_steps, step: all_steps.at[i].set(step), out, sampled)
            return i + 1, pages, state, out

        def more(carry) -> jax.Array:
            i, _, state, _ = carry
            return (i < num_steps) & jnp.any(is_active(state, batch))

        out = empty_samples(self.max_steps, batch.slot.shape[0], with_logprobs=batch.sampling is not None)
        _, pages, state, out = jax.lax.while_loop(more, one_step, (jnp.int32(0), list(pages), state, out))
        return pages, state, out

    def decode_step(
        self, params: Any, pages: Pages, state: SlotState, batch: RowBatch, table_RM: jax.Array
    ) -> tuple[list[Any], SlotState, sampling.Sampled]:
        """One iteration of one token per row; rows that have stopped stay idle."""
        num_rows, length, active = batch.slot.shape[0], state.length[batch.slot], is_active(state, batch)
        position = length - 1
        targets = cache_slots(table_RM, jnp.arange(num_rows), position, active, page_size_of(pages[0]))
        rows = SingleRows(jnp.where(active, length, 0), table_RM)
        tokens = state.history[batch.slot, position]
        x_RD, pages = self.forward(params, pages, tokens, position, targets, rows, state.adapter[batch.slot])
        logits_RV = self.model(params).logits(x_RD, self.placement.fitted(num_rows).shard)
        state, sampled = self._sample_and_store(logits_RV, state, batch, active)
        return pages, state, sampled

    def score(self, params: Any, hidden_TD: jax.Array, targets_T: jax.Array) -> tuple[sampling.Sampled]:
        """Log-probability of a given next token at every position, and the likeliest ones, a few rows at a time."""
        model, (num_tokens, width) = self.model(params), hidden_TD.shape
        block = math.gcd(num_tokens, 32)

        def some(rows: tuple[jax.Array, jax.Array]) -> sampling.Sampled:
            return sampling.with_logprobs(model.logits(rows[0], self.placement.fitted(block).shard), rows[1])

        scored = jax.lax.map(some, (hidden_TD.reshape(-1, block, width), targets_T.reshape(-1, block)))
        return (jax.tree.map(lambda a: a.reshape(num_tokens, *a.shape[2:]), scored),)

    def pool(self, params: Any, hidden_TD: jax.Array, weights_T: jax.Array) -> tuple[jax.Array]:
        """Weighted sum of final-norm hidden states: float32 `[D]`."""
        normed_TD = self.model(params).normed(hidden_TD).astype(jnp.float32)
        return (jnp.sum(jnp.where(weights_T[:, None] != 0, normed_TD * weights_T[:, None], 0.0), axis=0),)

    def admit(
        self, state: SlotState, slot: jax.Array, tokens_L: jax.Array, length: jax.Array, adapter: jax.Array
    ) -> tuple[SlotState]:
        """Give a slot to a new request: its known tokens become the slot's history."""
        state = dataclasses.replace(
            state,
            history=state.history.at[slot].set(tokens_L),
            length=state.length.at[slot].set(length),
            done=state.done.at[slot].set(False),
            adapter=state.adapter.at[slot].set(adapter),
            hit_rate=state.hit_rate.at[slot].set(jnp.array(FIRST_HIT_RATES)),
        )
        return (state,)

    def set_masks(self, state: SlotState, slots_G: jax.Array, masks_GJW: jax.Array) -> tuple[SlotState]:
        """Say which tokens may come next in these slots, and after their drafts."""
        return (dataclasses.replace(state, allowed=state.allowed.at[slots_G].set(masks_GJW)),)

    def _sample_and_store(
        self, logits_RV: jax.Array, state: SlotState, batch: RowBatch, active: jax.Array
    ) -> tuple[SlotState, sampling.Sampled]:
        length = state.length[batch.slot]
        sampled = self.sampled(logits_RV, state, batch, length)
        tokens = sampled.tokens
        stopped = active & (jnp.any(tokens[:, None] == batch.stop_ids, axis=1) | (tokens == sampling.NOT_FINITE))
        slot = jnp.where(active, batch.slot, state.done.shape[0] - 1)
        history = state.history.at[slot, length].set(jnp.maximum(tokens, 0))
        state = dataclasses.replace(
            state, history=history, length=state.length.at[slot].add(1), done=state.done.at[slot].max(stopped)
        )
        return state, dataclasses.replace(sampled, tokens=jnp.where(active, tokens, sampling.IDLE))

    def sampled(self, logits_RV: jax.Array, state: SlotState, batch: RowBatch, length: jax.Array) -> sampling.Sampled:
        """One token for each row of logits, each after `length` `[R]` tokens of its slot's history.

        A row of the batch may have several rows of logits, one after the other.
        """
        if batch.sampling is None:
            sampled = sampling.sample_greedy(logits_RV)
        else:
            per_row = length.shape[0] // batch.slot.shape[0]
            rows, stop_ids = jax.tree.map(lambda a: jnp.repeat(a, per_row, axis=0), (batch.sampling, batch.stop_ids))
            masks = state.allowed[batch.slot, :per_row]
            rows = dataclasses.replace(rows, allowed=masks.reshape(-1, masks.shape[-1]))
            sampled = sampling.sample(logits_RV, rows, state.history[batch.slot], length, stop_ids)
        return dataclasses.replace(sampled, tokens=self.placement.shard(sampled.tokens, None))

    def model(self, params: Any) -> Decoder:
        """The decoder with these parameters."""
        own = params[: self.params_tree.num_leaves]
        return nnx.merge(self.graph, jax.tree.unflatten(self.params_tree, own))

    def draft_params(self, params: Any) -> Any:
        """Those of them that are the draft model's."""
        return params[self.params_tree.num_leaves :]

    def forward(
        self, params: Any, pages: Pages, tokens, position, targets, rows: Rows, adapter_T: jax.Array | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """The decoder over the cache. Each layer writes its rows before it attends, so rows may share pages.

        `adapter_T` are the slots of the tokens' adapters; None: this model has no adapters.
        """
        adapters = params.adapters if isinstance(params, Weights) else {}
        product = slotted_product(adapters, adapter_T) if adapters and adapter_T is not None else plain_product
        placement = self.placement if isinstance(rows, RingBatch) else self.placement.unringed()
        updated, placement = list(pages), placement.fitted(tokens.shape[0])
        tokens, position = placement.shard(tokens, "tokens"), placement.shard(position, "tokens")
        targets = placement.shard(targets, "pages")
        write_and_attend = functools.cache(functools.partial(self._over_heads, rows, pages[0]))

        def attend_layer(
            layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array, spec: AttentionSpec, sinks_KG: jax.Array | None
        ) -> jax.Array:
            run = write_and_attend(spec)
            out, updated[layer] = run(q_TKGH, kv_TK2H, updated[layer], targets, rows, sinks_KG)
            return out

        context = Context(
            attend_layer,
            placement.shard,
            placement.over_shards,
            self.residual_dtype,
            placement.gathered,
            self.longest,
            product,
        )
        return self.model(params)(tokens, position, context), updated

    def _over_heads(self, rows: Rows, pages: Any, spec: AttentionSpec) -> Callable:
        """Cache write and attention, on each device for the replica and the heads it holds.

        No collective can arise, but those of the ring where the rules cut a replica's tokens.

        Made once for each kind of layer, so that it is traced once per kind and not once per layer.
        """

        placement = self.placement

        def local(q, kv, layer_pages, targets, rows, sinks):
            if isinstance(rows, RingBatch):
                return ring_attention(
                    q,
                    kv,
                    layer_pages,
                    targets,
                    rows,
                    write=write_pages,
                    axis=str(placement.ring_axis()),
                    size=placement.ring_size(),
                    spec=spec,
                    sinks_KG=sinks,
                )
            if isinstance(rows, RaggedRows):
                rows = dataclasses.replace(rows, num_single=rows.num_single.reshape(()))  # this section's own
            layer_pages = write_pages(layer_pages, kv, targets)
            out = attention(q, layer_pages, rows, spec=spec, sinks_KG=sinks, backend=self.backend)
            return out, layer_pages

        if placement.mesh.size == 1:
            return jax.jit(local)
        row = self.cfg.cache_row
        cached, heads = page_specs(row, pages, placement.spec), placement.spec(query_dims(row)[1:])
        replica = placement.spec(("pages",)) if placement.parts("pages") > 1 else PartitionSpec()
        tokens = placement.spec(("tokens" if isinstance(rows, RingBatch) else "pages",))
        queries = PartitionSpec(*tokens, *heads)
        keys = queries if row.is_cut else tokens
        over_heads = jax.shard_map(
            local,
            mesh=placement.mesh,
            in_specs=(
                queries,
                keys,
                cached,
                replica,
                jax.tree.map(lambda _: replica, rows),
                PartitionSpec(*heads[:2]),
            ),
            out_specs=(queries, cached),
            check_vma=False,
        )
        return jax.jit(over_heads)


def cache_slots(table: jax.Array, row, position, valid: jax.Array, page_size: int) -> jax.Array:
    """Where each token's keys and values go; what is not valid goes to page 0."""
    return jnp.where(valid, table[row, position // page_size] * page_size + position % page_size, 0)


def is_active(state: SlotState, batch: RowBatch) -> jax.Array:
    """Which rows of a decode loop go on: `[R]`."""
    return ~state.done[batch.slot] & (state.length[batch.slot] < batch.limit)


def empty_samples(steps: int, rows: int, *, with_logprobs: bool) -> sampling.Sampled:
    """Nothing sampled yet, `[steps, R]`."""
    tokens = jnp.full((steps, rows), sampling.IDLE, jnp.int32)
    if not with_logprobs:
        return sampling.Sampled(tokens)
    top = (steps, rows, sampling.MAX_LOGPROBS)
    return sampling.Sampled(tokens, jnp.zeros((steps, rows)), jnp.zeros(top, jnp.int32), jnp.zeros(top))
