"""One optimiser step and one evaluation, compiled: state and batches in, state and sums out.

Everything is sharded as the rules say: parameters and moments as weights, tokens as activations. The state is donated.

Dimension letters: A micro-batches, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxllm.training.batch import TokenBatch
from jaxllm.training.loss import LossModel, Parameters, Sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class TrainState:
    """What a step changes.

    Attributes:
        step: int32, steps so far.
        parameters: float32, by name: those that are trained.
        moments: the optimiser's.
    """

    step: jax.Array
    parameters: dict[str, jax.Array]
    moments: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class StepReport:
    """Float32 scalars of one step: mean loss per weighted token, norm of the derivative before clipping."""

    loss: jax.Array
    grad_norm: jax.Array
    correct: jax.Array


@dataclass(frozen=True)
class TrainStep:
    """The compiled functions of one run.

    Args:
        model: what computes the loss.
        optimizer: see `jaxllm.training.optimizer`.
        shardings: of the trained parameters, by name.
        max_grad_norm: 0 for no clipping.
    """

    model: LossModel
    optimizer: optax.GradientTransformation
    shardings: dict[str, NamedSharding]
    max_grad_norm: float

    def initial(self, parameters: dict[str, jax.Array]) -> TrainState:
        """The state before the first step."""
        shapes = jax.eval_shape(self.optimizer.init, parameters)
        moments = jax.jit(self.optimizer.init, out_shardings=self.moment_shardings(shapes))(parameters)
        return TrainState(jax.device_put(jnp.int32(0), self._whole), parameters, moments)

    def moment_shardings(self, shapes: Any) -> Any:
        """Moments lie where their parameters do."""

        def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
            name = next(
                (str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey) and k.key in self.shardings), None
            )
            is_like = name is not None and leaf.ndim >= len(self.shardings[name].spec)
            return self.shardings[name] if name is not None and is_like else self._whole

        return jax.tree_util.tree_map_with_path(place, shapes)

    @property
    def _whole(self) -> NamedSharding:
        return self.model.placement.replicated

    def compiled(self) -> Callable[[TrainState, TokenBatch, jax.Array, Parameters], tuple[TrainState, StepReport]]:
        """`step(state, batches [A, T], total, frozen)`: `total` is the sum of all weights of the batches."""
        return jax.jit(self._step, donate_argnums=0)

    def evaluation(self) -> Callable[[Parameters, TokenBatch, Parameters], Sums]:
        """`evaluate(parameters, batch [T], frozen)`: sums over the batch."""
        return jax.jit(lambda parameters, batch, frozen: self.model.sums({**frozen, **parameters}, batch))

    def _step(
        self, state: TrainState, batches: TokenBatch, total: jax.Array, frozen: Parameters
    ) -> tuple[TrainState, StepReport]:
        sums, gradient = self._gradient(state.parameters, batches, frozen)
        gradient = jax.tree.map(lambda g: g / total, gradient)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradient.values()))
        if self.max_grad_norm:
            factor = self.max_grad_norm / jnp.maximum(norm, self.max_grad_norm)
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        updates, moments = self.optimizer.update(gradient, state.moments, state.parameters)
        parameters: Any = optax.apply_updates(state.parameters, updates)
        parameters = {name: self._placed(name, value) for name, value in parameters.items()}
        report = StepReport((sums.loss + sums.extra) / total, norm, sums.correct / total)
        return TrainState(state.step + 1, parameters, moments), report

    def _placed(self, name: str, value: jax.Array) -> jax.Array:
        one_device = self.model.placement.mesh.size == 1
        return value if one_device else jax.lax.with_sharding_constraint(value, self.shardings[name])

    def _gradient(
        self, parameters: Parameters, batches: TokenBatch, frozen: Parameters
    ) -> tuple[Sums, dict[str, jax.Array]]:
        """Of the sum over all micro-batches, one after the other."""

        def loss(parameters: Parameters, batch: TokenBatch) -> tuple[jax.Array, Sums]:
            sums = self.model.sums({**frozen, **parameters}, batch)
            return sums.loss + sums.extra, sums

        derivative = jax.grad(loss, has_aux=True)
        if batches.tokens.shape[0] == 1:
            gradient, sums = derivative(parameters, jax.tree.map(lambda a: a[0], batches))
            return sums, gradient

        def add(carry: Any, batch: TokenBatch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, derivative(parameters, batch)), None

        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(derivative, parameters, _first(batches)))
        (gradient, sums), _ = jax.lax.scan(add, nothing, batches)
        return sums, gradient


def _first(batches: TokenBatch) -> TokenBatch:
    return jax.tree.map(lambda a: a[0], batches)
