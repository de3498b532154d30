"""The one contraction of rows with a matrix: accumulated in float32, over the dims in the order they lie in memory."""

from __future__ import annotations

import string

import jax
import jax.numpy as jnp


def contraction(spec: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """`einsum` in float32; float32 means float32 on every backend, where a GPU would take tf32.

    `jnp.einsum` sums over several dims in the order of their letters. Where that is not the order in which they lie,
    XLA's GPU backend writes a transposed copy of the matrix before each product: for `TKGH,KGHD->TD`, of the whole
    output projection in every iteration. So the letters are renamed to follow the matrix.
    """
    matrix = spec.split("->")[0].split(",")[1]
    others = [letter for letter in dict.fromkeys(spec) if letter.isalpha() and letter not in matrix]
    renamed = str.maketrans(dict(zip([*matrix, *others], string.ascii_letters, strict=False)))
    precision = "highest" if w.dtype == jnp.float32 else None
    return jnp.einsum(spec.translate(renamed), x, w, preferred_element_type=jnp.float32, precision=precision)


def num_contracted(spec: str) -> int:
    """How many dims of its first operand an einsum sums over: its last ones, sizes of 1 included."""
    operands, out = spec.split("->")
    return sum(letter not in out for letter in operands.partition(",")[0])
