"""What attention must know of a flat batch: for each row its queries, its cache length and its pages.

Dimension letters: R rows (one row = the queries of one request in this iteration), M pages per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RaggedRows:
    """The tuple `(q_start, q_end, kv_length)` per request, as arrays, and the page tables.

    The first `num_single` rows have exactly one query each, at flat index = row index; the rows after them have
    any number. Query `i` of a row sits at absolute position `kv_len - q_len + i` and sees what is at or before it.

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
