"""A run's state on disk: written while the run goes on, the newest kept by count, read back bit for bit.

The state holds parameters, moments and the step; the order of the data and every random number follow from step and
seed, so there is nothing else to keep. Orbax writes each process's own shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxllm.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        output: the run's folder.
        keep: how many.
    """

    def __init__(self, output: Path, keep: int):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager((output / FOLDER).absolute(), options=options)

    @property
    def newest(self) -> int | None:
        """The step of the newest whole one; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Begin to write; what is still being written is waited for."""
        if self._manager.latest_step() == step:
            return
        args = self._ocp.args
        self._manager.save(
            step, args=args.Composite(state=args.StandardSave(_tree(_copy(state))), facts=args.JsonSave(facts))
        )

    def restore(self, like: TrainState, facts: dict[str, Any]) -> TrainState:
        """The newest state, in the shardings of `like`.

        Raises:
            ValueError: it is of another run: a fact differs, or a parameter's shape.
        """
        step, args = self.newest, self._ocp.args
        assert step is not None
        try:
            before = self._manager.restore(step, args=args.Composite(facts=args.JsonRestore()))["facts"]
        except Exception as error:
            raise ValueError(f"the checkpoint of step {step} cannot be read: {_line(error)}; remove it") from error
        for name, value in facts.items():
            if before.get(name) != value:
                raise ValueError(
                    f"the checkpoint was made with {name}={before.get(name)!r}, not {value!r}; resume with that, or "
                    "name another output"
                )
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), _tree(like))
        try:
            tree = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(shapes)))["state"]
        except Exception as error:
            raise ValueError(f"the checkpoint of step {step} does not fit this run: {_line(error)}") from error
        leaves = [tree["leaves"][name] for name in sorted(tree["leaves"])]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _tree(state: TrainState) -> dict[str, Any]:
    """The leaves under plain names: the optimiser's own classes are nobody's business on disk."""
    return {"leaves": {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}}


def _copy(state: TrainState) -> TrainState:
    """The next step takes the arrays themselves, while they may still be being written."""
    return jax.tree.map(jnp.copy, state)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
