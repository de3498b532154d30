"""Drafts without a model: what followed the last tokens where they stood before (Saxena 2023, "prompt lookup").

Histories on the device -> drafted tokens. The longest match wins, among equals the latest. Where it stands so close to
the end that the tokens after it run out, the text is taken to go on in that period. Runs on the device, where the
histories of running requests are; cost follows the longest of them.

Dimension letters: R rows, G drafts, S slots, L positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.config import SpeculativeConfig

_BLOCK = 1024  # positions compared at a time


def look_up(
    history_SL: jax.Array, slot: jax.Array, length: jax.Array, most: jax.Array, config: SpeculativeConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Up to `most` `[R]` drafts for each row: tokens `[R, G]`, how many there are, and tokens that matched, `[R]` each.

    Args:
        history_SL: every slot's tokens.
        slot: `[R]`, each row's.
        length: `[R]`, tokens in it.
        most: `[R]`; rows with 0 are not looked up.
        config: how many drafts, and how long a match must be and may be.
    """
    longest, num_positions = config.longest_lookup, history_SL.shape[1]
    block = min(_BLOCK, num_positions)
    suffix = history_SL[slot[:, None], jnp.maximum(length[:, None] - 1 - jnp.arange(longest), 0)]
    offset = jnp.arange(-longest, block)

    def compare(i: jax.Array, best: jax.Array) -> jax.Array:
        """Positions after which a match could go on, as `matched tokens * (L + 1) + position`, the largest so far."""
        start = i * block
        seen = history_SL[slot[:, None], jnp.clip(start + offset, 0, num_positions - 1)]
        position = start + jnp.arange(block)
        matched = jnp.zeros((slot.shape[0], block), jnp.int32)
        still = (position < length[:, None]) & (most[:, None] > 0)
        for n in range(longest):  # the token n before the end against that n before each position
            before = seen[:, longest - 1 - n : longest - 1 - n + block]
            still = still & (before == suffix[:, n, None]) & (position > n)
            matched = matched + still
        key = jnp.where(matched >= config.shortest_lookup, matched * (num_positions + 1) + position, 0)
        return jnp.maximum(best, jnp.max(key, axis=1))

    needed = jnp.max(jnp.where(most > 0, length, 0))
    best = jax.lax.fori_loop(0, -(-needed // block), compare, jnp.zeros(slot.shape, jnp.int32))
    matched, position = jnp.divmod(best, num_positions + 1)
    period = jnp.maximum(length - position, 1)
    ahead = jnp.arange(config.num_speculative_tokens) % period[:, None]
    drafts_RG = history_SL[slot[:, None], position[:, None] + ahead]
    return drafts_RG, jnp.where(best > 0, most, 0), matched
