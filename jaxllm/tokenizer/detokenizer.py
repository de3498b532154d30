"""Text as tokens arrive.

Inputs: token ids of one sequence, a few at a time. Outputs: the new text, never half a character, so that all
pieces together are exactly `decode(all ids)`. It knows nothing of stop strings or requests.

`tokenizers.decoders.DecodeStream` is not used: it has no way to release what it holds at the end of a
sequence, and holds text without bound while a model emits bytes that are not UTF-8.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import final


class IncrementalDetokenizer(ABC):
    """A stream of text for one sequence."""

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str:
        """Take new token ids and return the text that is now certain (maybe empty)."""

    @abstractmethod
    def finish(self) -> str:
        """Return what was held back, as `decode` would give it. The stream is empty afterwards."""


@final
class ByteDetokenizer(IncrementalDetokenizer):
    """For byte-level vocabularies: concatenate bytes, hold back only an unfinished UTF-8 character.

    Python's decoder and the library's both replace each maximal invalid part by one U+FFFD, hence equal text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: Container[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self._token_bytes(i) for i in ids if i not in self._skipped))

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@final
class WindowDetokenizer(IncrementalDetokenizer):
    """For every other decoder: decode the last emitted tokens with the new ones and return what is new.

    The emitted tokens give the context a decoder may want (a space between words, none before the first).
    Held back: a run of byte-fallback tokens until it ends, since one invalid byte changes the text of the
    whole run; and text that ends in U+FFFD, which may be half a character.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        skipped: Container[int],
        byte_ids: Container[int],
        known: Container[int],
    ) -> None:
        self._decode = decode
        self._skipped, self._byte_ids, self._known = skipped, byte_ids, known
        self._reset()

    def push(self, ids: Sequence[int]) -> str:
        self._pending += [i for i in ids if i not in self._skipped and i in self._known]
        if not self._pending or self._pending[-1] in self._byte_ids:
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith("\ufffd") or not text.startswith(self._context_text):
            return ""
        return self._emit(text)

    def finish(self) -> str:
        text = self._decode(self._context + self._pending)[len(self._context_text) :]
        self._reset()
        return text

    def _emit(self, text: str) -> str:
        new = text[len(self._context_text) :]
        own_text = self._decode(self._pending)
        if own_text:
            self._context, self._context_text = self._pending, own_text
        else:
            # A context without text would make the next token look like the first of the sequence.
            self._context, self._context_text = self._context + self._pending, text
        self._pending = []
        return new

    def _reset(self) -> None:
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []
