"""The one contraction of rows with a matrix: accumulated in float32, over the dims in the order they lie in memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def contraction(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum`, summed `in_order` and in float32, which means float32 on every backend: a GPU would take tf32."""
    precision = "highest" if w.dtype == jnp.float32 else None
    return jnp.einsum(in_order(spec), x, w, preferred_element_type=jnp.float32, precision=precision)


def in_order(spec: str) -> str:
    """The same contraction with the letters that are summed over in the order in which they lie in the matrix.

    `jnp.einsum` sums over several dims in the order of their letters. Where that is another one, XLA's GPU backend
    writes a transposed copy of the matrix before each product: for `TKGH,KGHD->TD`, of the whole output projection in
    every iteration. So it becomes `TGHK,GHKD->TD`.
    """
    terms, out = spec.split("->")
    x, w = terms.split(",")
    summed = [letter for letter in w if letter in x and letter not in out]
    return spec.translate(str.maketrans(dict(zip(summed, sorted(summed), strict=True))))


def num_contracted(spec: str) -> int:
    """How many dims of its first operand an einsum sums over: its last ones, sizes of 1 included."""
    operands, out = spec.split("->")
    return sum(letter not in out for letter in operands.partition(",")[0])
