"""A sample of what a model says while it is being trained: no cache, one span, one token after the other.

The engine does this many times faster; it would have to be given every step's weights.

Dimension letters: T tokens of a span, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.training.batch import TokenBatch
from jaxllm.training.loss import LossModel, Parameters

_TEMPERATURE = 0.8


def sampler(model: LossModel, spans: int) -> Callable[..., jax.Array]:
    """`sample(parameters, tokens [T], length, end, count, key)` -> tokens `[T]`, compiled: fills in what is missing.

    Args:
        spans: of a batch, so that it divides by the mesh as training batches do.
    """
    span = model.span

    def sample(parameters: Parameters, tokens_T: jax.Array, length: jax.Array, count: jax.Array, key: jax.Array):
        decoder = model.decoder(parameters)

        def next_token(i: jax.Array, tokens_T: jax.Array) -> jax.Array:
            flat = jnp.tile(tokens_T, spans)
            positions = jnp.tile(jnp.arange(span), spans)
            batch = TokenBatch(flat, flat, jnp.ones(flat.shape), positions, None)
            x_TD, _ = model.hidden(decoder, parameters, batch)
            row = jax.lax.dynamic_slice_in_dim(x_TD, i - 1, 1)
            logits_V = decoder.logits(row, lambda x, *_: x)[0]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits_V / _TEMPERATURE)
            return tokens_T.at[i].set(token.astype(jnp.int32))

        return jax.lax.fori_loop(length, jnp.minimum(length + count, span), next_token, tokens_T)

    return jax.jit(sample, out_shardings=model.placement.replicated)


def padded(prompt: Sequence[int], span: int, count: int) -> tuple[np.ndarray, int]:
    """The last tokens of a prompt in a span that has room for `count` more, as far as it has; and how many they are."""
    kept = list(prompt)[-max(1, span - count) :]
    tokens = np.zeros(span, np.int32)
    tokens[: len(kept)] = kept
    return tokens, len(kept)
