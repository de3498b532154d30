"""What one rendering of a chat template may use: steps, characters, processor time.

Inputs: charges from the environment in `template_environment.py`. Output: `TemplateLimitError` once a bound
is passed. Every loop iteration, call, filter and new text is charged, *before* it is carried out where its
size can be known, so a template can neither allocate nor spin past the bounds. It knows nothing of Jinja.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Any

MAX_STEPS = 500_000
MAX_CHARS = 128_000_000  # all text made, kept or not: templates that cut a long message make it several times
MAX_SECONDS = 2.0
MAX_ITEMS = 200_000  # members of one value, all levels together


class TemplateLimitError(ValueError):
    """A template went past a bound."""


class Budget:
    """Counts down; one for each rendering, `share` of the bounds where a failure costs nobody anything."""

    __slots__ = ("chars", "deadline", "steps")

    def __init__(self, share: float = 1.0) -> None:
        self.steps = int(MAX_STEPS * share)
        self.chars = int(MAX_CHARS * share)
        # Time of this thread, not of the clock: a busy machine must not change which requests are served.
        self.deadline = time.thread_time() + MAX_SECONDS * share

    def charge(self, steps: int, chars: int) -> None:
        self.steps -= steps
        self.chars -= chars
        if self.steps < 0:
            raise TemplateLimitError(f"the chat template takes over {MAX_STEPS} steps; simplify its loops")
        if self.chars < 0:
            raise TemplateLimitError(f"the chat template makes over {MAX_CHARS} characters; shorten its text")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"the chat template runs over {MAX_SECONDS} s; simplify its loops")


current_budget: ContextVar[Budget] = ContextVar("current_budget")


def charge(steps: int, chars: int = 0) -> None:
    current_budget.get().charge(steps, chars)


def weigh(value: Any) -> int:
    """Members of a nested value, shared parts counted each time they appear.

    Counting what would be visited, not what is stored, stops a list of two references to a list of two
    references to ... thirty levels deep, which would take for ever to print or compare. As each container
    is weighed when it is built, no heavier one exists.
    """
    return printed_size(value)[0]


def printed_size(value: Any) -> tuple[int, int]:
    """Members, as `weigh` counts them, and characters of the texts among them."""
    items, chars, rest = 0, 0, [value]
    while rest:
        value = rest.pop()
        items += 1
        if isinstance(value, str):
            chars += len(value)
        elif isinstance(value, dict):
            rest += value.keys()
            rest += value.values()
        elif isinstance(value, list | tuple):
            rest += value
        if items + len(rest) > MAX_ITEMS:
            raise TemplateLimitError(f"the chat template builds a value of over {MAX_ITEMS} members; shorten it")
    return items, chars


def paid(value: Any) -> Any:
    """`value`, something a template just made, after charging for it."""
    if isinstance(value, str):
        charge(0, len(value))
    else:
        measured(value)
    return value


def measured(value: Any) -> Any:
    """`value`, after weighing and charging it if it is a container."""
    if isinstance(value, list | tuple | dict):
        weigh(value)
        charge(1 + len(value) // 8)
    return value


def to_text(value: Any) -> str:
    """`str(value)`, charged before it is made."""
    if not isinstance(value, str):
        charge(*printed_size(value))
        value = str(value)
    charge(0, len(value))
    return value
