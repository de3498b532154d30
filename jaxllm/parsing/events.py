"""What a parser says about a model's answer, piece by piece: text, reasoning, calls.

Every route builds its own shapes from these events; nothing here knows a route or a format.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

Tools = Mapping[str, Mapping[str, Any]]
"""Name of each function the model may call -> JSON schema of its arguments, `{}` where there is none."""

NewId = Callable[[], str]


def call_id() -> str:
    """An id as OpenAI's server writes it."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class Text:
    """The next piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of what the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a known function begins; its arguments follow."""

    name: str
    id: str = field(default_factory=call_id)


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the text of the call's arguments, a JSON object when whole."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is over; not `complete` where the answer ended within its arguments."""

    complete: bool = True


Event = Text | Reasoning | CallStart | CallArguments | CallEnd


class Parser(Protocol):
    """Takes one answer's text as it comes. The events of all calls together do not depend on how it is cut."""

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        ...

    def finish(self) -> list[Event]:
        """What was held back; an open call is ended."""
        ...


@dataclass(slots=True)
class ParsedCall:
    """A call put together again."""

    name: str
    id: str
    arguments: str = ""
    complete: bool = False


@dataclass(slots=True)
class ParsedAnswer:
    """An answer put together again; `parts` are its texts, thoughts and calls in their order."""

    text: str = ""
    reasoning: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    parts: list[Text | Reasoning | ParsedCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """Whole answer of an answer's events."""
    answer = ParsedAnswer()
    for event in joined(events):
        match event:
            case Text():
                answer.text += event.text
                answer.parts.append(event)
            case Reasoning():
                answer.reasoning += event.text
                answer.parts.append(event)
            case CallStart():
                answer.calls.append(ParsedCall(event.name, event.id))
                answer.parts.append(answer.calls[-1])
            case CallArguments():
                answer.calls[-1].arguments += event.text
            case CallEnd():
                answer.calls[-1].complete = event.complete
    return answer


def joined(events: Iterable[Event]) -> list[Event]:
    """The same with neighbouring pieces of one kind made one."""
    result: list[Event] = []
    for event in events:
        if isinstance(event, Text | Reasoning | CallArguments) and result and type(result[-1]) is type(event):
            result[-1] = type(event)(result[-1].text + event.text)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            result.append(event)
    return result
