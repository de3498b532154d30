"""Tokens that may not be sampled: `allowed_token_ids` and `bad_words`, as constraints beside a grammar.

Inputs: token ids. Outputs: bit masks; see `jaxllm.scheduling.request.Constraint`. Knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np

_WORD_BITS = 32


class CopiedConstraint(Protocol):
    """A constraint that each completion takes a copy of."""

    is_fixed: bool
    warnings: tuple[str, ...]
    finished: bool
    error: str | None

    def copy(self) -> CopiedConstraint: ...

    def accept(self, token: int) -> None: ...

    def forced(self) -> Sequence[int]: ...

    def rewind(self, tokens: Sequence[int]) -> None: ...

    def fill_mask(self, words: Any) -> None: ...


@final
class TokenMask:
    """The same tokens at every position.

    Args:
        mask: int32, a bit per token of the vocabulary, lowest bit first.
    """

    is_fixed = True

    def __init__(self, mask: np.ndarray):
        self._mask = mask
        self.finished = False
        self.error: str | None = None
        self.warnings: tuple[str, ...] = ()

    def copy(self) -> TokenMask:
        """Itself: it has no state."""
        return self

    def accept(self, token: int) -> None:
        """Nothing changes."""

    def forced(self) -> Sequence[int]:
        """None: masks of a single token are too rare to look for."""
        return ()

    def rewind(self, tokens: Sequence[int]) -> None:
        """Nothing changes."""

    def fill_mask(self, words: Any) -> None:
        """Write the mask."""
        words[:] = self._mask


@final
class BannedSequences:
    """The last token of each sequence is forbidden where the ones before it have just been sampled.

    Args:
        sequences: token ids, two or more each.
    """

    is_fixed = False

    def __init__(self, sequences: Sequence[tuple[int, ...]], recent: Sequence[int] = ()):
        self.finished = False
        self.error: str | None = None
        self.warnings: tuple[str, ...] = ()
        self._sequences = sequences
        self._longest = max(map(len, sequences), default=1)
        self._recent = list(recent)

    def copy(self) -> BannedSequences:
        """An independent one in the same state."""
        return BannedSequences(self._sequences, self._recent)

    def accept(self, token: int) -> None:
        """Remember it."""
        self._recent = [*self._recent, token][-self._longest :]

    def forced(self) -> Sequence[int]:
        """None: what is forbidden leaves a choice."""
        return ()

    def rewind(self, tokens: Sequence[int]) -> None:
        """Remember the last of these."""
        self._recent = list(tokens)[-self._longest :]

    def fill_mask(self, words: Any) -> None:
        """Write what may come after the tokens so far."""
        words[:] = -1
        for *before, last in self._sequences:
            if self._recent[-len(before) :] == before:
                _clear(words, last)


@final
class AllOf:
    """Several constraints at once."""

    def __init__(self, parts: Sequence[CopiedConstraint]):
        self._parts = parts
        self.is_fixed = all(part.is_fixed for part in parts)
        self.warnings = tuple(text for part in parts for text in part.warnings)
        self._look()

    def _look(self) -> None:
        self.finished = any(part.finished for part in self._parts)
        self.error = next((part.error for part in self._parts if part.error), None)

    def copy(self) -> AllOf:
        """Independent copies of all."""
        return AllOf([part.copy() for part in self._parts])

    def accept(self, token: int) -> None:
        """Tell all of them."""
        for part in self._parts:
            part.accept(token)
        self._look()

    def forced(self) -> Sequence[int]:
        """What the first says that forces any."""
        return next((tokens for part in self._parts if (tokens := part.forced())), ())

    def rewind(self, tokens: Sequence[int]) -> None:
        """Set all of them back."""
        for part in self._parts:
            part.rewind(tokens)
        self._look()

    def fill_mask(self, words: Any) -> None:
        """Only what all of them allow; where that is nothing, what the first allows: an answer must go on."""
        first, *others = self._parts
        first.fill_mask(words)
        alone, mask = words.copy(), np.empty_like(words)
        for part in others:
            part.fill_mask(mask)
            words &= mask
        if not words.any():
            words[:] = alone
        self._look()


def all_of(parts: Sequence[CopiedConstraint | None]) -> CopiedConstraint | None:
    """One constraint in place of those that are there."""
    given = [part for part in parts if part is not None]
    return given[0] if len(given) == 1 else AllOf(given) if given else None


def token_rules(
    vocab_size: int, *, allowed: Sequence[int] = (), banned: Sequence[Sequence[int]] = ()
) -> CopiedConstraint | None:
    """The constraint for a list of allowed tokens (none: all) and sequences that may not come."""
    singles = [sequence[0] for sequence in banned if len(sequence) == 1]
    longer = [tuple(sequence) for sequence in banned if len(sequence) > 1]
    mask = None
    if allowed or singles:
        mask = np.full(-(-vocab_size // _WORD_BITS), 0 if allowed else -1, np.int32)
        for token in allowed:
            mask[token // _WORD_BITS] |= _bit(token)
        for token in singles:
            _clear(mask, token)
        if not mask.any():
            raise ValueError("bad_words and allowed_token_ids together leave no token; allow more")
    return all_of([TokenMask(mask) if mask is not None else None, BannedSequences(longer) if longer else None])


def _bit(token: int) -> np.int32:
    return np.int32(np.uint32(1 << token % _WORD_BITS).view(np.int32))


def _clear(words: Any, token: int) -> None:
    words[token // _WORD_BITS] &= ~_bit(token)
