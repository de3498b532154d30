"""What attention must know: of a flat batch each row's queries, cache length and pages; of a layer its scores.

Dimension letters: R rows (one row = the queries of one request in this iteration), M pages per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How one layer's scores are made; static, so layers that agree share a program.

    Attributes:
        scale: multiplies the scores.
        window: keys that a query sees at most, its own included; None = all before it.
        softcap: scores become `softcap * tanh(score / softcap)`.
        value_width: None: keys and values alternate in the cache. Else one row per token serves as both: it is
            the key, and its first `value_width` columns are the value (multi-head latent attention).
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    value_width: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RaggedRows:
    """The tuple `(q_start, q_end, kv_length)` per request, as arrays, and the page tables.

    The first `num_single` rows have exactly one query each, at flat index = row index; the rows after them have
    any number. Queries lie in the order of their rows. Query `i` of a row sits at absolute position
    `kv_len - q_len + i` and sees what is at or before it.

    Attributes:
        q_start: int32 `[R]`, index of the row's first query in the flat batch.
        q_len: int32 `[R]`, number of its queries; 0 = the row is empty.
        kv_len: int32 `[R]`, tokens in its cache including these queries.
        num_single: int32 scalar.
        page_table: int32 `[R, M]`, its pages in order; entries past its length may be anything in range.
    """

    q_start: jax.Array
    q_len: jax.Array
    kv_len: jax.Array
    num_single: jax.Array
    page_table: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SingleRows:
    """Rows of one query each, as in a decode: query `r` belongs to row `r`.

    Attributes:
        kv_len: int32 `[R]`, tokens in the row's cache including its query; 0 = the row is idle.
        page_table: int32 `[R, M]`.
    """

    kv_len: jax.Array
    page_table: jax.Array
