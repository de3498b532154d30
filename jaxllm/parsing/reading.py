"""The parser of one answer: runs a format's reader as text comes, and leaves out white space that only sets apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import final

from jaxllm.parsing.events import Event, Reasoning, Text, joined
from jaxllm.parsing.source import Source, Steps


@final
class Reading:
    """A reader with its source: the `Parser` that routes feed.

    Args:
        reader: reads the whole answer.
        opened: the answer begins within a thought.
    """

    def __init__(self, reader: Callable[[Source], Steps[None]], *, opened: bool = False):
        self._source = Source()
        self._steps = reader(self._source)
        self._tidy = _Tidy(opened)
        self._done = False

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        self._source.add(text)
        return joined(self._drive())

    def finish(self) -> list[Event]:
        """What was held back."""
        self._source.ended = True
        return joined([*self._drive(), *self._tidy.finish()])

    def _drive(self) -> Iterator[Event]:
        while not self._done:
            try:
                event = next(self._steps)
            except StopIteration:
                self._done = True
                return
            if event is None:
                return
            yield from self._tidy.tidied(event)


@final
class _Tidy:
    """Drops white space around thoughts, before calls, and behind them where no text follows."""

    def __init__(self, opened: bool):
        self._gap = ""
        self._run: type[Text | Reasoning] | None = None  # what the last piece was; None after a call
        self._bare = True  # the run is white space so far
        self._begun: set[type[Event]] = set()
        self._marked = opened  # there was a thought or a call

    def tidied(self, event: Event) -> list[Event]:
        """What to pass on for one event."""
        if not isinstance(event, Text | Reasoning):
            self._gap, self._run, self._marked = "", None, True
            return [event]
        kind = type(event)
        if kind is not self._run:
            self._gap, self._run, self._bare = "", kind, True
            self._marked |= kind is Reasoning
        text = self._gap + event.text
        if self._marked and kind not in self._begun:
            text = text.lstrip()
        body = text.rstrip()
        self._gap = text[len(body) :]
        if not body:
            return []
        self._bare = False
        self._begun.add(kind)
        return [kind(body)]

    def finish(self) -> list[Event]:
        """White space at the end of a text belongs to it."""
        keeps = self._run is Text and not (self._marked and self._bare)
        return [Text(self._gap)] if keeps and self._gap else []
