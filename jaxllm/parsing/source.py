"""Text that is still arriving, read as if it were all there.

A reader is a generator over a `Source`: it yields events, and `None` when it needs more text; a `Reading` runs it as
far as the text goes. So each format is written as a plain recursive descent, and how the text was cut cannot matter:
no reader sees where a piece ended.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar, final

from jaxllm.parsing.events import Event

T = TypeVar("T")
Steps = Generator[Event | None, None, T]
_FORGET_CHARS = 1 << 14


@final
class Source:
    """A buffer and a position in it, which a reader may set back."""

    def __init__(self) -> None:
        self.pos = 0
        self.ended = False
        self._text = ""

    def add(self, text: str) -> None:
        """More text at the end."""
        self._text += text

    def forget(self) -> None:
        """Drop what was read; positions kept by a reader become invalid."""
        if self.pos > _FORGET_CHARS:
            self._text, self.pos = self._text[self.pos :], 0

    @property
    def rest(self) -> str:
        """What has arrived and is not read."""
        return self._text[self.pos :]

    def read(self) -> str:
        """All that has arrived."""
        text, self.pos = self.rest, len(self._text)
        return text

    def next_char(self) -> Steps[str]:
        """The next character, not read; empty at the end."""
        while self.pos == len(self._text) and not self.ended:
            yield None
        return self._text[self.pos : self.pos + 1]

    def spaces(self) -> Steps[str]:
        """Read white space."""
        start = self.pos
        while (yield from self.next_char()).isspace():
            self.pos += 1
        return self._text[start : self.pos]

    def take(self, *markers: str) -> Steps[str]:
        """Read the longest of these markers that comes next; if none does, nothing is read and the result is empty."""
        longest = max(map(len, markers), default=0)
        while True:
            rest = self._text[self.pos : self.pos + longest]
            if self.ended or not any(len(m) > len(rest) and m.startswith(rest) for m in markers):
                break
            yield None
        found = max((m for m in markers if rest.startswith(m)), key=len, default="")
        self.pos += len(found)
        return found

    def until(self, markers: Sequence[str], make: Callable[[str], Event]) -> Steps[str]:
        """Yield the text before the next marker, read the marker and return it; empty at the end of the text."""
        while True:
            start, end = self._next_marker(self.pos, tuple(markers))
            if start > self.pos:
                yield make(self._text[self.pos : start])
                self.pos = start
            if end > start or self.ended:
                self.pos = end
                return self._text[start:end]
            self.forget()
            yield None

    def capture(self, *markers: str) -> Steps[tuple[str, str]]:
        """Read up to and with the next marker: (text, marker), or (the rest, empty) where none comes."""
        begin = scan = self.pos
        while True:
            start, end = self._next_marker(scan, markers)
            if end > start or self.ended:
                self.pos = end
                return self._text[begin:start], self._text[start:end]
            scan = start
            yield None

    def _next_marker(self, pos: int, markers: tuple[str, ...]) -> tuple[int, int]:
        """(start, end) of the first marker from `pos` on; without one, twice where one may begin, or the end."""
        size = len(self._text)
        if not markers:
            return size, size
        held = 0 if self.ended else max(overlap(self._text, pos, m) for m in markers)
        found = _pattern(markers).search(self._text, pos)
        # A marker that is on its way may begin before the one found, or be a longer one that begins with it.
        return found.span() if found and found.start() < size - held else (size - held, size - held)


@functools.lru_cache(256)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)))


def overlap(text: str, pos: int, marker: str) -> int:
    """Length of the longest end of `text[pos:]` that begins `marker` without being all of it."""
    longest = min(len(marker) - 1, len(text) - pos)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
