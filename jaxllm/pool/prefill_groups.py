"""Who is prefilled next, where: groups of one model, first come first served.

Requests in, one instance's next group out. A request joins a group of its model that has had fewer than eight members,
on any instance; else it opens one on the least crowded, then the least loaded. Plain Python, for the server and the
simulator alike; an instance is a mesh that holds one model at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from jaxllm.pool.costs import Costs

MAX_GROUP = 8
Crowding = Callable[[int, str], tuple[bool, int]]  # instance and model -> no place beside its own kind; models there


def _nobody(_: int, __: str) -> tuple[bool, int]:
    return False, 0


@dataclass(slots=True, eq=False)
class Group:
    """Requests of one model that are prefilled one after another.

    Attributes:
        size: members so far; those that left count, so that a group in service cannot grow for ever.
        waiting: those that were not handed out yet.
    """

    model: str
    size: int = 0
    waiting: deque[Hashable] = field(default_factory=deque)


class PrefillGroups:
    """Groups of several instances.

    Args:
        instances: their names.
        costs: estimates, for the load of an instance.
        max_group: members of a group.
        crowding: how little an instance suits a model's next request, apart from what waits to be prefilled there.
    """

    def __init__(
        self, instances: Sequence[int], costs: Costs, *, max_group: int = MAX_GROUP, crowding: Crowding = _nobody
    ):
        self._costs, self._max_group, self._crowding = costs, max_group, crowding
        self._queues: dict[int, deque[Group]] = {instance: deque() for instance in instances}
        self._serving: dict[int, Group | None] = dict.fromkeys(instances)
        self._where: dict[Hashable, tuple[int, str]] = {}  # of requests that are not prefilled yet

    def __contains__(self, item: Hashable) -> bool:
        return item in self._where

    def add(self, item: Hashable, model: str) -> int:
        """Queue a request; returns its instance."""
        assert item not in self._where, "a request is prefilled once"
        instance, group = self._open_group(model) or self._new_group(model)
        group.size += 1
        group.waiting.append(item)
        self._where[item] = instance, model
        return instance

    def _open_group(self, model: str) -> tuple[int, Group] | None:
        return next(
            (
                (instance, group)
                for instance in self._queues
                for group in self._groups(instance)
                if group.model == model and group.size < self._max_group
            ),
            None,
        )

    def _new_group(self, model: str) -> tuple[int, Group]:
        instance = min(self._queues, key=lambda one: self._unfit(one, model))
        group = Group(model)
        self._queues[instance].append(group)
        return instance, group

    def _unfit(self, instance: int, model: str) -> tuple[bool, int, float]:
        lacks, others = self._crowding(instance, model)
        return lacks, others, self.load(instance)

    def _groups(self, instance: int) -> list[Group]:
        serving = self._serving[instance]
        return [*([serving] if serving is not None else []), *self._queues[instance]]

    def load(self, instance: int) -> float:
        """Seconds until everything that an instance has is prefilled, switches included."""
        work = sum(
            self._costs.prefill_seconds(model, item) for item, (i, model) in self._where.items() if i == instance
        )
        return work + sum(self._costs.switch_seconds(group.model) for group in self._queues[instance])

    def head(self, instance: int) -> str | None:
        """The model of the next group."""
        return next((group.model for group in self._groups(instance) if group.waiting), None)

    def head_seconds(self, instance: int, current: str | None) -> float:
        """Until the next group is prefilled, its switch included where it is not the current model's."""
        group = next(group for group in self._groups(instance) if group.waiting)
        work = sum(self._costs.prefill_seconds(group.model, item) for item in group.waiting)
        return work + (self._costs.switch_seconds(group.model) if group.model != current else 0.0)

    def take(self, instance: int, model: str | None = None) -> list[Hashable]:
        """Hand out the members of the next group (of `model`, if given); it stays open for more until the next call."""
        serving, queue = self._serving[instance], self._queues[instance]
        if serving is not None and serving.waiting:
            queue.appendleft(serving)
        self._serving[instance] = None
        group = next((group for group in queue if model in (None, group.model)), None)
        if group is None:
            return []
        queue.remove(group)
        self._serving[instance] = group
        return self.joining(instance)

    def joining(self, instance: int) -> list[Hashable]:
        """Hand out who has joined the group in service since."""
        group = self._serving[instance]
        if group is None:
            return []
        items = list(group.waiting)
        group.waiting.clear()
        return items

    def end(self, item: Hashable) -> None:
        """A request is prefilled, or gone."""
        instance, _ = self._where.pop(item)
        for group in self._groups(instance):
            if item in group.waiting:
                group.waiting.remove(item)
                if not group.waiting and group is not self._serving[instance]:
                    self._queues[instance].remove(group)
                return

    def models(self, instance: int) -> list[str]:
        """The models of waiting groups, in their order."""
        return list(dict.fromkeys(group.model for group in self._groups(instance) if group.waiting))

    def under_way(self, instance: int) -> set[str]:
        """Models of all requests that are not prefilled yet."""
        return {model for i, model in self._where.values() if i == instance}
