"""Which batch decodes next, where, and for how long: weighted rounds.

Prefilled requests in, turns out. A request joins a batch of its model that has room, else it opens one on the instance
with the fewest. Every round visits each batch of an instance once, batches of one model side by side, each for its
quota. Plain Python, for the server and the simulator alike.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from jaxllm.pool.costs import Costs
from jaxllm.pool.quotas import TBT_SECONDS, quotas


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one model that decode together, in the order in which they came."""

    model: str
    instance: int
    members: dict[Hashable, None] = field(default_factory=dict)


class DecodeRounds:
    """Batches of several instances.

    Args:
        instances: their names.
        costs: times of steps and switches, and the size of a batch.
        tbt: seconds between tokens that are promised.
        longest: seconds that a turn may last; default: `longest_turn`.
    """

    def __init__(
        self, instances: Sequence[int], costs: Costs, *, tbt: float = TBT_SECONDS, longest: float | None = None
    ):
        self._costs, self._tbt, self._longest = costs, tbt, longest
        self._batches: dict[int, list[Batch]] = {instance: [] for instance in instances}
        self._round: dict[int, list[tuple[Batch, float]]] = {instance: [] for instance in instances}  # still to come
        self._batch_of: dict[Hashable, Batch] = {}

    def __contains__(self, item: Hashable) -> bool:
        return item in self._batch_of

    def add(self, item: Hashable, model: str, instance: int | None = None) -> int:
        """A request is prefilled and decodes from now on, on `instance` if given; returns where."""
        assert item not in self._batch_of, "a request decodes in one batch"
        batch = self._fitting(model, instance) or self._new_batch(model, instance)
        batch.members[item] = None
        self._batch_of[item] = batch
        return batch.instance

    def _fitting(self, model: str, instance: int | None) -> Batch | None:
        most = self._costs.max_batch(model)
        where = self._batches if instance is None else (instance,)
        batches = (batch for one in where for batch in self._batches[one])
        return next((b for b in batches if b.model == model and len(b.members) < most), None)

    def crowding(self, instance: int, model: str) -> tuple[bool, int]:
        """Whether no batch of a model has room on an instance, and how many batches of any are there."""
        return self._fitting(model, instance) is None, len(self._batches[instance])

    def _new_batch(self, model: str, instance: int | None) -> Batch:
        if instance is None:
            instance = min(self._batches, key=lambda one: len(self._batches[one]))
        batch = Batch(model, instance)
        self._batches[instance].append(batch)
        return batch

    def remove(self, item: Hashable) -> None:
        """A request has ended."""
        batch = self._batch_of.pop(item)
        del batch.members[item]
        if not batch.members:
            self._batches[batch.instance].remove(batch)
            self._round[batch.instance] = [turn for turn in self._round[batch.instance] if turn[0] is not batch]

    def take(self, instance: int, model: str) -> tuple[Batch, float] | None:
        """This model's next turn of the round under way, a batch and its seconds; None where it has had all."""
        turn = next((turn for turn in self._round[instance] if turn[0].model == model), None)
        if turn is not None:
            self._round[instance].remove(turn)
        return turn

    def head(self, instance: int, current: str | None = None) -> str | None:
        """The model whose turn it is; `current` is the one that needs no switch."""
        turns = self._turns(instance, current)
        return turns[0][0].model if turns else None

    def _turns(self, instance: int, current: str | None) -> list[tuple[Batch, float]]:
        """What is left of the round, or a new one; the current model's turns first: they need no switch."""
        if not self._round[instance]:
            self._round[instance] = self._new_round(instance)
        self._round[instance].sort(key=lambda turn: turn[0].model != current)
        return self._round[instance]

    def _new_round(self, instance: int) -> list[tuple[Batch, float]]:
        order = list(dict.fromkeys(batch.model for batch in self._batches[instance]))
        batches = sorted(self._batches[instance], key=lambda batch: order.index(batch.model))
        switching = sum(self._costs.switch_seconds(model) for model in order) if len(order) > 1 else 0.0
        steps = [self._costs.step_seconds(batch.model, len(batch.members)) for batch in batches]
        turns = quotas(steps, switching, tbt=self._tbt, longest=self._longest)
        return list(zip(batches, turns.seconds, strict=True))

    def models(self, instance: int) -> list[str]:
        """Models in the order of the turns to come: the rest of this round, then the next one."""
        rest = [batch.model for batch, _ in self._round[instance]]
        return list(dict.fromkeys([*rest, *(batch.model for batch in self._batches[instance])]))

    def members(self, instance: int, model: str) -> list[Hashable]:
        """All requests of a model that decode here."""
        return [item for batch in self._batches[instance] if batch.model == model for item in batch.members]
