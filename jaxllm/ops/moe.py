"""Mixture of experts: who goes where, and products grouped by expert.

Router scores -> chosen experts and weights; rows sorted by expert times one matrix per expert -> rows. No token
is dropped, and the cost follows the rows that are routed, not experts x tokens.

Dimension letters: T tokens, E experts, X experts per token, M routed rows (T * X), D rows' width, F products'
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxllm.config import RoutedExperts


def route(logits_TE: jax.Array, cfg: RoutedExperts, correction_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return each token's experts, int32 `[T, X]`, and their weights, float32 `[T, X]`."""
    logits_TE = logits_TE.astype(jnp.float32)
    if cfg.score == "softmax_chosen":
        chosen, expert_TX = jax.lax.top_k(logits_TE, cfg.per_token)
        return expert_TX, jax.nn.softmax(chosen, axis=-1) * cfg.scale
    scores_TE = jax.nn.sigmoid(logits_TE) if cfg.score == "sigmoid" else jax.nn.softmax(logits_TE, axis=-1)
    preference_TE = scores_TE if correction_E is None else scores_TE + correction_E
    if cfg.num_groups > 1:
        preference_TE = _best_groups(preference_TE, cfg)
    _, expert_TX = jax.lax.top_k(preference_TE, cfg.per_token)
    weight_TX = jnp.take_along_axis(scores_TE, expert_TX, axis=1)
    if cfg.renormalize:
        weight_TX = weight_TX / (jnp.sum(weight_TX, axis=1, keepdims=True) + 1e-20)
    return expert_TX, weight_TX * cfg.scale


def _best_groups(preference_TE: jax.Array, cfg: RoutedExperts) -> jax.Array:
    """Experts outside the token's best groups get -inf (device-limited routing of DeepSeek-V2)."""
    num_tokens = preference_TE.shape[0]
    grouped = preference_TE.reshape(num_tokens, cfg.num_groups, -1)
    if cfg.group_score == "max":
        group_scores = jnp.max(grouped, axis=-1)
    else:
        group_scores = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    _, best = jax.lax.top_k(group_scores, cfg.groups_per_token)
    kept = jnp.any(best[:, :, None] == jnp.arange(cfg.num_groups), axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(num_tokens, -1)


def sort_by_expert(expert_TX: jax.Array, first: jax.Array, num_local: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Order the routed rows by expert, those of other devices' experts last.

    Args:
        expert_TX: each token's experts.
        first: number of the first expert held here.
        num_local: how many are held here.

    Returns:
        `order [M]`: position in `expert_TX.ravel()` of each sorted row; `place [M]`: its inverse; `sizes [E]`:
        rows of each expert held here.
    """
    local_M = expert_TX.reshape(-1) - first
    local_M = jnp.where((local_M >= 0) & (local_M < num_local), local_M, num_local)
    order = jnp.argsort(local_M, stable=True)
    place = jnp.argsort(order)
    return order, place, jnp.sum(local_M[:, None] == jnp.arange(num_local), axis=0, dtype=jnp.int32)


class Experts(Protocol):
    """Matrices of all experts that are not kept as an array: each can be multiplied by itself."""

    shape: tuple[int, ...]

    def expert(self, number: jax.Array) -> Any:
        """One of them, with `product(spec, x)`."""
        ...


def grouped_product(spec: str, x_MD: jax.Array, w: jax.Array | Experts, sizes_E: jax.Array) -> jax.Array:
    """Rows of group `e` times `w[e]`, as `spec` says for one expert ("MD,DXF->MXF"): float32."""
    experts, inputs, *kept = w.shape
    if isinstance(w, jax.Array):
        y = grouped_matmul(x_MD, w.reshape(experts, inputs, math.prod(kept)), sizes_E)
        return y.reshape(-1, *kept)
    y = _blocked(lambda rows, e: w.expert(e).product(spec, rows).reshape(len(rows), -1), x_MD, math.prod(kept), sizes_E)
    return y.reshape(-1, *kept)


@jax.custom_vjp
def grouped_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows of group `e` times `w[e]`: float32 `[M, F]`; rows past the last group give zeros.

    XLA's own ragged product where it is native; on the CPU it is expanded into experts x rows, so there the
    groups are walked in blocks by a loop whose trip count is data.
    """
    x_MD = x_MD.astype(w_EDF.dtype)
    return jax.lax.platform_dependent(x_MD, w_EDF, sizes_E, cpu=_blocked_matmul, default=_ragged)


def _forward(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array):
    return grouped_matmul(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _backward(kept: tuple[jax.Array, jax.Array, jax.Array], change_MF: jax.Array):
    """The loop over blocks has no derivative of its own; that of the ragged product is the same."""
    x_MD, w_EDF, sizes_E = kept
    _, pull = jax.vjp(lambda x, w: _ragged(x.astype(w.dtype), w, sizes_E), x_MD, w_EDF)
    return (*pull(change_MF), None)


grouped_matmul.defvjp(_forward, _backward)


def _ragged(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    precision = "highest" if w_EDF.dtype == jnp.float32 else None
    y_MF = jax.lax.ragged_dot(x_MD, w_EDF, sizes_E, precision=precision, preferred_element_type=jnp.float32)
    return jnp.where((jnp.arange(x_MD.shape[0]) < jnp.sum(sizes_E))[:, None], y_MF, 0.0)


def _blocked_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    precision = "highest" if w_EDF.dtype == jnp.float32 else None

    def multiply(rows: jax.Array, expert: jax.Array) -> jax.Array:
        return jnp.einsum("BD,DF->BF", rows, w_EDF[expert], preferred_element_type=jnp.float32, precision=precision)

    return _blocked(multiply, x_MD, w_EDF.shape[2], sizes_E)


def _blocked(
    multiply: Callable[[jax.Array, jax.Array], jax.Array], x_MD: jax.Array, width: int, sizes_E: jax.Array
) -> jax.Array:
    """Blocks in the order of their groups: what a block writes past its group's end, the next group overwrites.

    `multiply(rows [B, D], expert)` gives `[B, width]`.
    """
    num_rows, num_experts = x_MD.shape[0], sizes_E.shape[0]
    block = _block_rows(num_rows, num_experts)
    counts = -(-sizes_E // block)
    ends = jnp.cumsum(counts)
    facts = jnp.stack([ends - counts, jnp.cumsum(sizes_E) - sizes_E, sizes_E], axis=1)
    x_pad = jnp.pad(x_MD, ((0, block), (0, 0)))

    def one_block(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.minimum(jnp.sum(ends <= i), num_experts - 1)
        begin, start, size = facts[expert]
        offset = (i - begin) * block
        rows = jax.lax.dynamic_slice_in_dim(x_pad, start + offset, block)
        y = multiply(rows, expert)
        y = jnp.where((jnp.arange(block) < size - offset)[:, None], y, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start + offset, axis=0)

    out = jnp.zeros((num_rows + block, width), jnp.float32)
    return jax.lax.fori_loop(0, ends[-1], one_block, out)[:num_rows]


def _block_rows(num_rows: int, num_experts: int) -> int:
    """About one block per expert when rows spread evenly; never under 8, where a product costs what 1 row does."""
    return min(128, max(8, 1 << (-(-num_rows // num_experts) - 1).bit_length()))
