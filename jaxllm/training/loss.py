"""The decoder as a function with a derivative: parameters by name and a flat batch -> what to add up for a loss.

Dimension letters: T tokens, D model width, V vocabulary (or labels), E experts, C rows of a chunk.
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
from flax import nnx

from jaxllm.models.decoder import Block, Context, Decoder
from jaxllm.models.primitives import Product, plain_product
from jaxllm.ops.attention import AttentionSpec
from jaxllm.ops.attention.packed import packed_attention
from jaxllm.sharding.mesh import Placement
from jaxllm.sharding.rules import as_tuple
from jaxllm.training import kernels
from jaxllm.training.batch import TokenBatch
from jaxllm.weights.abstract import AbstractModel

Parameters = Mapping[str, jax.Array]
_CHUNK_LOGITS = 1 << 25  # logits that exist at a time


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: cross-entropy, and what keeps it well-behaved.

    Attributes:
        z_loss: times the square of the log of the softmax's denominator (PaLM, Chowdhery et al. 2022).
        balance: times the load-balancing loss of routed experts (Switch Transformers, Fedus et al. 2021).
    """

    z_loss: float = 0.0
    balance: float = 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Sums:
    """Over the tokens of a batch, each times its weight, float32 scalars.

    Attributes:
        loss: cross-entropy in nats. extra: what is minimised beside it. correct: likeliest target was the right one.
    """

    loss: jax.Array
    extra: jax.Array
    correct: jax.Array


@dataclass(frozen=True)
class LossModel:
    """A model of one placement, ready to be trained.

    Attributes:
        model: the decoder without values, its matrices in the dtype that products are computed in.
        span: tokens that are attended together; every batch is a whole number of spans.
        remat: keep only the inputs of blocks for the derivative, and compute the rest of them again.
        product: multiplies with a block's matrices, see `Context`; gets the parameters too.
        head: the name of the parameter `[V, D]` that makes logits instead of the LM head; None for that.
    """

    model: AbstractModel
    span: int
    objective: Objective = Objective()
    remat: bool = False
    product: Callable[[Parameters], Product] = lambda parameters: plain_product
    head: str | None = None

    @functools.cached_property
    def placement(self) -> Placement:
        """Rows of the head are cut as tokens are; the vocabulary by what is left."""
        placement = self.model.placement
        table = dict(placement.rules.activations)
        tokens = as_tuple(table.get("tokens"))
        table["rows"] = tokens
        table["vocab"] = tuple(axis for axis in as_tuple(table.get("vocab")) if axis not in tokens)
        return dataclasses.replace(placement, rules=dataclasses.replace(placement.rules, activations=table))

    def sums(self, parameters: Parameters, batch: TokenBatch) -> Sums:
        """Loss of one batch, not yet divided by the sum of its weights."""
        decoder = self.decoder(parameters)
        x_TD, balance = self.hidden(decoder, parameters, batch)
        sums = self._over_chunks(self._logits(decoder, parameters), x_TD, batch)
        if self.objective.balance and balance:
            extra = self.objective.balance * sum(balance) * jnp.sum(batch.weights)
            sums = dataclasses.replace(sums, extra=sums.extra + extra)
        return sums

    def decoder(self, parameters: Parameters) -> Decoder:
        """The module with these values, cast to what products are computed in."""
        state = [
            (path, variable.replace(parameters[name_of(path)].astype(variable.get_value().dtype)))
            for path, variable in nnx.to_flat_state(self.model.state)
        ]
        return nnx.merge(self.model.graph, nnx.from_flat_state(state))

    def hidden(self, decoder: Decoder, parameters: Parameters, batch: TokenBatch) -> tuple[jax.Array, list[jax.Array]]:
        """Hidden states `[T, D]` before the final norm, and each routed layer's balancing loss."""
        place, product, balance = self.placement, self.product(parameters), []
        on_cpu = place.mesh.devices.flat[0].platform == "cpu"

        def attend(
            layer: int, q_TKGH: jax.Array, kv_TK2H: jax.Array, spec: AttentionSpec, sinks_KG: jax.Array | None
        ) -> jax.Array:
            dtype = jnp.float32 if on_cpu else self.dtype  # XLA's CPU backend has no narrow products of batches
            return packed_attention(
                q_TKGH.astype(dtype),
                kv_TK2H.astype(dtype),
                batch.documents,
                span=self.span,
                spec=spec,
                sinks_KG=sinks_KG,
            )

        context = Context(
            attend,
            place.shard,
            place.over_shards,
            jnp.dtype(jnp.float32) if on_cpu else self.dtype,  # between products a CPU is faster in float32
            functools.partial(self._block, balance),
            longest=self.span,
            product=kernels.trained_product(place) if product is plain_product else product,
            **kernels.context_fields(place, batch, self.span),
        )
        tokens, positions = place.shard(batch.tokens, "tokens"), place.shard(batch.positions, "tokens")
        return decoder(tokens, positions, context), balance

    @property
    def dtype(self) -> jnp.dtype:
        """Of products."""
        return dict(nnx.to_flat_state(self.model.state))["embedding",].get_value().dtype

    def _block(self, balance: list[jax.Array], block: Block) -> Callable[..., jax.Array]:
        """A block with its weights gathered; where it is computed again for the derivative, they are again too."""
        graph, state = nnx.split(block)

        def run(state: Any, x_TD: jax.Array, rope: Any, context: Context) -> tuple[jax.Array, list[jax.Array]]:
            routed: list[jax.Array] = []
            context = dataclasses.replace(context, routed=lambda *choice: routed.append(balancing_loss(*choice)))
            return self.placement.gathered(nnx.merge(graph, state))(x_TD, rope, context), routed

        def call(x_TD: jax.Array, rope: Any, context: Context) -> jax.Array:
            inner = functools.partial(run, context=context)
            x_TD, routed = (jax.checkpoint(inner) if self.remat else inner)(state, x_TD, rope)
            balance.extend(routed)
            return x_TD

        return call

    def _logits(self, decoder: Decoder, parameters: Parameters) -> Callable[[jax.Array], jax.Array]:
        if self.head is None:
            return lambda x_CD: decoder.logits(x_CD, self.placement.shard)
        table_VD = parameters[self.head]
        return lambda x_CD: jnp.einsum(
            "CD,VD->CV", decoder.normed(x_CD).astype(jnp.float32), table_VD, precision="highest"
        )

    def _over_chunks(self, logits: Callable[[jax.Array], jax.Array], x_TD: jax.Array, batch: TokenBatch) -> Sums:
        """Few logits exist at a time: chunks of rows, whose logits the derivative computes again."""
        num_tokens = x_TD.shape[0]
        width = self.model.cfg.vocab_size if self.head is None else 1
        chunks = math.gcd(num_tokens, -(-num_tokens * width // _CHUNK_LOGITS) if self.placement.mesh.size == 1 else 1)
        one = functools.partial(self._chunk, logits)
        if chunks == 1:
            return one(x_TD, batch.targets, batch.weights)
        rows = jax.tree.map(lambda a: a.reshape(chunks, -1, *a.shape[1:]), (x_TD, batch.targets, batch.weights))
        return jax.tree.map(jnp.sum, jax.lax.map(jax.checkpoint(lambda row: one(*row)), rows))

    def _chunk(self, logits: Callable, x_CD: jax.Array, targets_C: jax.Array, weights_C: jax.Array) -> Sums:
        logits_CV = logits(x_CD)
        denominator_C = jax.nn.logsumexp(logits_CV, axis=-1)
        chosen_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
        extra = self.objective.z_loss * jnp.sum(denominator_C**2 * weights_C)
        correct_C = jnp.argmax(jax.lax.stop_gradient(logits_CV), axis=-1) == targets_C
        return Sums(jnp.sum((denominator_C - chosen_C) * weights_C), extra, jnp.sum(correct_C * weights_C))


def balancing_loss(logits_TE: jax.Array, expert_TY: jax.Array) -> jax.Array:
    """Experts times the sum over experts of the share of tokens sent there times the mean probability; 1 when even."""
    num_experts = logits_TE.shape[1]
    sent_E = jnp.mean(jax.nn.one_hot(expert_TY, num_experts, dtype=jnp.float32), axis=(0, 1))
    wanted_E = jnp.mean(jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1), axis=0)
    return num_experts * jnp.sum(sent_E * wanted_E)


def name_of(path: Sequence[Any]) -> str:
    """A parameter's path in the decoder as one word: `layers.3.attention.qkv`."""
    return ".".join(map(str, path))
