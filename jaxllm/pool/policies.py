"""Whose turn it is on each instance: between tokens, or only between requests.

Both policies take requests when they come, hear when a prompt is prefilled and when a request ends, and say which model
an instance runs next, which prompts it begins and for how long. Whoever carries that out (the pool's driver, the
simulator) asks `joining` while a turn lasts and `next_turn` when it is over: when its seconds have passed since its
prompts were prefilled, or it has nothing left to do. Plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from jaxllm.pool.costs import Costs
from jaxllm.pool.decode_rounds import DecodeRounds
from jaxllm.pool.prefill_groups import MAX_GROUP, PrefillGroups
from jaxllm.pool.quotas import TBT_SECONDS, longest_turn

PolicyName = Literal["token", "request"]
POLICIES: tuple[str, ...] = get_args(PolicyName)


@dataclass(frozen=True, slots=True)
class Turn:
    """What an instance does next.

    Attributes:
        model: that it holds.
        starts: requests to prefill first, one after another.
        members: requests that decode, also while prompts are prefilled.
        seconds: to decode from then on; infinite: until all of it is done.
    """

    model: str
    starts: tuple[Hashable, ...] = ()
    members: tuple[Hashable, ...] = ()
    seconds: float = 0.0


class Policy(Protocol):
    """See the module."""

    def add(self, item: Hashable, model: str) -> int:
        """A request has come; returns the instance that prefills it."""
        ...

    def prefilled(self, item: Hashable) -> int:
        """A request has its first token; returns the instance that decodes it."""
        ...

    def end(self, item: Hashable) -> None:
        """A request has ended, wherever it stood."""
        ...

    def next_turn(self, instance: int) -> Turn | None:
        """What an instance does now; None: nothing."""
        ...

    def joining(self, instance: int) -> tuple[Hashable, ...]:
        """Requests that the turn under way prefills as well, which have come since."""
        ...

    def upcoming(self, instance: int) -> list[str]:
        """The models whose turns follow, in their order, to fetch the first that is not there."""
        ...


def make_policy(
    name: str,
    costs: Costs,
    *,
    prefill: Sequence[int] = (0,),
    decode: Sequence[int] = (0,),
    tbt: float = TBT_SECONDS,
    longest: float | None = None,
    max_group: int = MAX_GROUP,
) -> Policy:
    """A policy by its name. Raises ValueError for an unknown one."""
    if name == "token":
        return TokenLevel(costs, prefill=prefill, decode=decode, tbt=tbt, longest=longest, max_group=max_group)
    if name == "request":
        return RequestLevel(costs, instances=sorted({*prefill, *decode}))
    raise ValueError(f"policy={name!r}; use one of {', '.join(POLICIES)}")


class TokenLevel:
    """Aegaeon's: prefill in groups, decode in weighted rounds.

    On an instance that does both, prompts go first: they are short, and who decodes has tokens in hand from its last
    turn. But after as many seconds of prompts as a turn may last, the batch whose turn it is decodes. A turn of a model
    takes along what else that model has: its next group, and its quota of the round unless other prompts wait. As
    requests stay, a group opens where a batch of its model has room, or where the fewest batches are.

    Args:
        costs: estimates of time.
        prefill, decode: instances for each, possibly the same ones. A request stays where it was prefilled if that
            decodes as well.
        tbt: seconds between tokens that are promised.
        longest: seconds that a turn may last; default: `longest_turn`.
        max_group: prompts that a turn prefills while others wait.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        prefill: Sequence[int] = (0,),
        decode: Sequence[int] = (0,),
        tbt: float = TBT_SECONDS,
        longest: float | None = None,
        max_group: int = MAX_GROUP,
    ):
        self._groups = PrefillGroups(prefill, costs, max_group=max_group, crowding=self._crowding)
        self._rounds = DecodeRounds(decode, costs, tbt=tbt, longest=longest)
        self._prefill, self._decode = frozenset(prefill), frozenset(decode)
        self._model_of: dict[Hashable, str] = {}
        self._prefills_at: dict[Hashable, int] = {}
        self._current: dict[int, str] = {}
        self._longest = longest_turn(tbt) if longest is None else longest
        self._prompt_seconds = dict.fromkeys((*prefill, *decode), 0.0)  # in a row, while somebody decodes

    def _crowding(self, instance: int, model: str) -> tuple[bool, int]:
        return self._rounds.crowding(instance, model) if instance in self._decode else (False, 0)

    def add(self, item: Hashable, model: str) -> int:
        """See `Policy`."""
        self._model_of[item] = model
        self._prefills_at[item] = self._groups.add(item, model)
        return self._prefills_at[item]

    def prefilled(self, item: Hashable) -> int:
        """See `Policy`."""
        self._groups.end(item)
        instance = self._prefills_at.pop(item)
        return self._rounds.add(item, self._model_of[item], instance if instance in self._decode else None)

    def end(self, item: Hashable) -> None:
        """See `Policy`."""
        if item in self._groups:
            self._groups.end(item)
            self._prefills_at.pop(item)
        else:
            self._rounds.remove(item)
        del self._model_of[item]

    def next_turn(self, instance: int) -> Turn | None:
        """See `Policy`."""
        model, is_for_prompts = self._next_model(instance)
        if model is None:
            return None
        self._current[instance] = model
        starts = self._groups.take(instance, model) if instance in self._prefill else []
        if instance not in self._decode:
            return Turn(model, tuple(starts))
        others_wait = self._head_group(instance) not in (None, model)
        taken = None if is_for_prompts and others_wait else self._rounds.take(instance, model)
        members = self._rounds.members(instance, model) if taken is None else taken[0].members
        return Turn(model, tuple(starts), tuple(members), taken[1] if taken is not None else 0.0)

    def _next_model(self, instance: int) -> tuple[str | None, bool]:
        """The model of the next turn, and whether it is there for its prompts."""
        current = self._current.get(instance)
        group = self._head_group(instance)
        batch = self._rounds.head(instance, current) if instance in self._decode else None
        if batch is None:
            self._prompt_seconds[instance] = 0.0
            return group, True
        if self._prompts_go_first(instance):
            self._prompt_seconds[instance] += self._groups.head_seconds(instance, current)
            return group, True
        self._prompt_seconds[instance] = 0.0
        return batch, False

    def _head_group(self, instance: int) -> str | None:
        return self._groups.head(instance) if instance in self._prefill else None

    def _prompts_go_first(self, instance: int) -> bool:
        """Whether the next group, if there is one, goes before those that decode; one always does after their turn."""
        if self._head_group(instance) is None:
            return False
        so_far = self._prompt_seconds[instance]
        more = self._groups.head_seconds(instance, self._current.get(instance))
        return not so_far or so_far + more <= self._longest

    def joining(self, instance: int) -> tuple[Hashable, ...]:
        """See `Policy`; while nobody else waits, groups without end."""
        if instance not in self._prefill:
            return ()
        items = self._groups.joining(instance)
        current = self._current.get(instance)
        while self._groups.models(instance) == [current] and self._others(instance) == set():
            items += self._groups.take(instance, current)
        return tuple(items)

    def _others(self, instance: int) -> set[str]:
        decoding = self._rounds.models(instance) if instance in self._decode else ()
        return {*self._groups.under_way(instance), *decoding} - {self._current.get(instance, "")}

    def upcoming(self, instance: int) -> list[str]:
        """See `Policy`."""
        groups = self._groups.models(instance) if instance in self._prefill else []
        rounds = self._rounds.models(instance) if instance in self._decode else []
        order = [*groups, *rounds] if self._prompts_go_first(instance) else [*rounds[:1], *groups, *rounds]
        return [model for model in dict.fromkeys(order) if model != self._current.get(instance)]


class RequestLevel:
    """The baseline: a model stays until its requests are done, then that of the request which waits longest comes.

    Requests of the model that runs join it as long as no other model's wait.
    """

    def __init__(self, costs: Costs, *, instances: Sequence[int] = (0,)):
        self._costs = costs
        self._waiting: dict[int, dict[Hashable, str]] = {instance: {} for instance in instances}
        self._running: dict[int, dict[Hashable, None]] = {instance: {} for instance in instances}
        self._current: dict[int, str] = {}
        self._where: dict[Hashable, int] = {}

    def add(self, item: Hashable, model: str) -> int:
        """See `Policy`; to an instance that has the model or expects it, else the one with the least to do."""
        instance = min(self._waiting, key=lambda one: (not self._expects(one, model), self._size(one)))
        self._waiting[instance][item] = model
        self._where[item] = instance
        return instance

    def _expects(self, instance: int, model: str) -> bool:
        runs = bool(self._running[instance]) and self._current.get(instance) == model
        return runs or model in self._waiting[instance].values()

    def _size(self, instance: int) -> int:
        return len(self._waiting[instance]) + len(self._running[instance])

    def prefilled(self, item: Hashable) -> int:
        """See `Policy`."""
        return self._where[item]

    def end(self, item: Hashable) -> None:
        """See `Policy`."""
        instance = self._where.pop(item)
        self._waiting[instance].pop(item, None)
        self._running[instance].pop(item, None)

    def next_turn(self, instance: int) -> Turn | None:
        """See `Policy`."""
        members = tuple(self._running[instance])
        if not members:
            if not self._waiting[instance]:
                return None
            self._current[instance] = next(iter(self._waiting[instance].values()))
            return Turn(self._current[instance], self._start(instance), (), math.inf)
        return Turn(self._current[instance], self.joining(instance), members, math.inf)

    def joining(self, instance: int) -> tuple[Hashable, ...]:
        """See `Policy`."""
        if {*self._waiting[instance].values()} != {self._current.get(instance)}:
            return ()
        return self._start(instance)

    def _start(self, instance: int) -> tuple[Hashable, ...]:
        """Those of the current model that wait, as many as decode together."""
        model, waiting = self._current[instance], self._waiting[instance]
        room = self._costs.max_batch(model) - len(self._running[instance])
        items = [item for item, its in waiting.items() if its == model][: max(0, room)]
        for item in items:
            del waiting[item]
            self._running[instance][item] = None
        return tuple(items)

    def upcoming(self, instance: int) -> list[str]:
        """See `Policy`."""
        models = dict.fromkeys(self._waiting[instance].values())
        return [model for model in models if model != self._current.get(instance)]
