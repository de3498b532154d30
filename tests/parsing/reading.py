"""Reading a whole answer, however it is cut, for tests of formats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from jaxllm.parsing.events import ParsedAnswer, Parser, collect
from jaxllm.parsing.registry import AnswerFormat

TOOLS = {
    "f": {
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer"},
            "ratio": {"type": "number"},
            "flag": {"type": "boolean"},
            "items": {"type": "array"},
            "more": {"type": "object"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "choice": {"enum": ["a", "b"]},
            "node": {"$ref": "#/$defs/Node"},
        },
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
    },
    "g": {},
    "get_time": {},
    "get_time.zone-2": {},
}


def parser_of(calls: str = "none", thinking: str = "none", prompt: str = "") -> Parser:
    return AnswerFormat.chosen(None, calls, thinking).parser(TOOLS, prompt)


def read(parser: Parser, pieces: Sequence[str]) -> ParsedAnswer:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return collect(events + parser.finish())


def cuts(text: str) -> Iterator[list[str]]:
    """Whole, into characters, and in two at every place."""
    yield [text]
    yield list(text)
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


def outline(answer: ParsedAnswer) -> tuple[str, str, list[tuple[str, object]]]:
    """(text, thoughts, calls); arguments as a value where they are whole, else as text."""
    calls = [(c.name, json.loads(c.arguments) if c.complete else c.arguments) for c in answer.calls]
    return answer.text, answer.reasoning, calls
