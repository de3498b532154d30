"""Counts the multiplications that a function really makes: loops whose trip count is data included."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest


def count_products(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *args: Any) -> int:
    """Multiply-adds of every `jnp.einsum` that one call executes, run without compilation."""
    einsum, total = jnp.einsum, 0

    def counted(spec: str, *operands: jax.Array, **settings: Any) -> jax.Array:
        nonlocal total
        inputs = spec.partition("->")[0].split(",")
        dims = [pair for names, x in zip(inputs, operands, strict=True) for pair in zip(names, x.shape, strict=True)]
        total += math.prod(dict(dims).values())
        return einsum(spec, *operands, **settings)

    monkeypatch.setattr(jnp, "einsum", counted)
    with jax.disable_jit():
        function(*args)
    monkeypatch.setattr(jnp, "einsum", einsum)
    return total
