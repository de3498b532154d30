"""Events as OpenAI's chat API writes them: one message, or the deltas of a stream.

Thoughts go out under both names that clients read, `reasoning_content` and `reasoning`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

from jaxllm.parsing.events import CallArguments, CallStart, Event, ParsedAnswer, Reasoning, Text


def message(answer: ParsedAnswer) -> dict[str, Any]:
    """The assistant's message of a whole answer; its content is null beside calls and thoughts without text."""
    marked = answer.calls or answer.reasoning
    result: dict[str, Any] = {"role": "assistant", "content": answer.text or (None if marked else ""), "refusal": None}
    if answer.reasoning:
        result |= _reasoning(answer.reasoning)
    if answer.calls:
        result["tool_calls"] = [_call(call.id, call.name, call.arguments) for call in answer.calls]
    return result


@final
class Deltas:
    """Numbers the calls of one streamed answer."""

    def __init__(self) -> None:
        self.num_calls = 0

    def of(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """A delta per event that a client hears of; a call's first has its id and name, the others arguments alone."""
        return [delta for event in events if (delta := self._delta(event))]

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Text():
                return {"content": event.text}
            case Reasoning():
                return _reasoning(event.text)
            case CallStart():
                self.num_calls += 1
                return self._indexed(_call(event.id, event.name, ""))
            case CallArguments():
                return self._indexed({"function": {"arguments": event.text}})
            case _:
                return None

    def _indexed(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.num_calls - 1} | call]}


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
