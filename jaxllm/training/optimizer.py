"""Derivatives -> changes of the weights: clipping, AdamW or Muon, weight decay on matrices, a schedule.

Parameters go by name. Knows nothing of models but which parameters are matrices.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import optax

from jaxllm.training.config import TrainConfig

_TABLES = ("embedding", "lm_head", "positions", "score")  # whose rows are looked up or chosen: AdamW's in any case


def learning_rate(config: TrainConfig, steps: int) -> optax.Schedule:
    """Up in a line, then down to `min_learning_rate`."""
    peak = config.peak_learning_rate
    warmup = min(100, steps // 20) if config.warmup_steps is None else config.warmup_steps
    low = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    left = max(1, steps - warmup)
    fall = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, left, low / peak if peak else 0.0),
        "linear": lambda: optax.linear_schedule(peak, low, left),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return fall
    # The first step already moves: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, matrices: Collection[str]
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices of blocks.

    Clipping is not in it: the step does that, because it logs the norm before it.

    Args:
        matrices: names of the parameters that decay.
    """

    def decays(parameters: dict[str, Any]) -> dict[str, bool]:
        return {name: name in matrices for name in parameters}

    def as_matrices(parameters: Any) -> dict[str, Any]:
        return {name: _as_matrix(name, value) if name in matrices else None for name, value in parameters.items()}

    if config.optimizer == "adamw":
        return optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decays)
    return optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        weight_decay_mask=decays,
        consistent_rms=0.2,  # as large as AdamW's steps, so that one learning rate serves both
        muon_weight_dimension_numbers=as_matrices,
    )


def _as_matrix(name: str, value: jax.Array) -> Any:
    """Which dims of a block's matrix are its rows and its columns; None for what AdamW takes."""
    if isinstance(value, optax.MaskedNode):  # what the other half of the parameters leaves of itself
        return None
    kind = name.rpartition(".")[2]
    dims = tuple(range(value.ndim))
    inputs = {"out": dims[:-1], "down": dims[-2:-1]}.get(kind, dims[:1])
    if name.partition(".")[0] in _TABLES or value.ndim < 2:
        return None
    if kind in ("gate_up", "down") and value.ndim == (4 if kind == "gate_up" else 3):  # of experts
        return optax.contrib.MuonDimensionNumbers(dims[1:2], dims[2:])
    return optax.contrib.MuonDimensionNumbers(inputs, tuple(d for d in dims if d not in inputs))
