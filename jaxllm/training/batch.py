"""One flat ragged batch of a training step.

Dimension letters: T tokens, A micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

Numbers = Any  # NumPy's array on the host, JAX's inside a program


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of whole spans end to end, each with what it is to predict. NumPy on the host, `[T]` or `[A, T]`.

    Attributes:
        tokens: int32.
        targets: int32: the next token, or the label of the document that ends here.
        weights: float32: how much a token's loss counts; 0 where there is nothing to predict.
        positions: int32, within the token's document.
        documents: int32, in runs; None where every span is one document.
    """

    tokens: Numbers
    targets: Numbers
    weights: Numbers
    positions: Numbers
    documents: Numbers | None
