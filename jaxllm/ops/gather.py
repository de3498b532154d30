"""Rows of a table by their numbers, with a derivative.

Dimension letters: V rows of the table, D width, T chosen rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gather_rows(table_VD: jax.Array, index_T: jax.Array) -> jax.Array:
    """`table[index]`, `[T, D]`; where a number comes twice, the derivative adds up."""
    return jax.lax.platform_dependent(table_VD, index_T, cpu=_as_integers, default=lambda table, index: table[index])


def _as_integers(table_VD: jax.Array, index_T: jax.Array) -> jax.Array:
    """XLA's CPU backend gathers bfloat16 by converting the table first, and moves that out of a decode loop, where it
    is no longer fused: hence gather integers, behind a barrier that keeps it inside. A TPU would copy the table.
    """
    table_VD, index_T = jax.lax.optimization_barrier((table_VD, index_T))
    bits = jnp.dtype(f"uint{8 * table_VD.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(table_VD, bits)[index_T], table_VD.dtype)


def _forward(table_VD: jax.Array, index_T: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return gather_rows(table_VD, index_T), (table_VD, index_T)


def _backward(kept: tuple[jax.Array, jax.Array], change_TD: jax.Array) -> tuple[jax.Array, None]:
    """Integers have no derivative, so it is written out: what each row was used for, added up in float32."""
    table_VD, index_T = kept
    total = jnp.zeros(table_VD.shape, jnp.float32).at[index_T].add(change_TD.astype(jnp.float32))
    return total.astype(table_VD.dtype), None


gather_rows.defvjp(_forward, _backward)
