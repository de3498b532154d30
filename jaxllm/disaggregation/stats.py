"""What handing requests over has moved, and how long anybody waited for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TransferStats:
    """Sums since the start.

    Attributes:
        handed_over: requests that went on in another engine.
        failed: requests whose pages did not come.
        bytes, pages: keys and values that travelled, in the logical layout, and pages of the receiver filled with them.
        pages_skipped: pages that the receiver had already.
        seconds: from taking a batch of pages out to having it on the receiver's devices, summed over batches.
        exposed_seconds: from a request's first token to the moment at which all its pages were there.
    """

    handed_over: int = 0
    failed: int = 0
    bytes: int = 0
    pages: int = 0
    pages_skipped: int = 0
    seconds: float = 0.0
    exposed_seconds: float = 0.0

    @property
    def hidden_share(self) -> float:
        """Share of the transfers' time that went by while prompts were still being computed."""
        return max(0.0, 1.0 - self.exposed_seconds / self.seconds) if self.seconds else 0.0
