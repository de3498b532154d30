"""What one call wants of the engine, whatever it is: the form in which `LLM` and `AsyncLLM` drive it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from jaxllm.engine.outputs import CompletionDelta


class Work(Protocol):
    """A prompt's completions, a scoring pass, a beam search: from its start to its end.

    Everything but making one happens where the engine is stepped.

    Attributes:
        error: why it ended without a result, if it did.
        notify: who hears of it: called with each delta, and with None when it is finished.
    """

    error: Exception | None
    notify: Callable[[Any, CompletionDelta | None], None] | None

    @property
    def finished(self) -> bool:
        """Whether it has ended, with or without a result."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether the device holds anything of it."""
        ...

    def start(self) -> None:
        """Queue it. Raises ValueError where that is refused, and then nothing stays behind."""
        ...

    def abort(self) -> None:
        """End it now; what has ended is left alone."""
        ...
