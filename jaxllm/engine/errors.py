"""What a request or an engine can end in, beside the ValueError of a bad request."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine failed while it worked on this request, or is dead; the cause is in the log."""


class NotFinite(ValueError):
    """The model's numbers for this request are not finite (NaN or infinite): it has no answer."""

    def __init__(self, what: str = "logits"):
        super().__init__(
            f"the model gave {what} that are not finite (NaN or infinite) for this request; "
            "check the weights, or use a wider dtype or kv_dtype"
        )


class Unavailable(RuntimeError):
    """The engine takes no more requests now: full, draining, stuck or dead. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after
