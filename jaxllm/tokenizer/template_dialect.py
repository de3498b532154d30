"""What a chat template expects of a conversation, found by giving it small ones.

Templates differ in what they take where OpenAI's messages leave no choice: no content beside a tool call (absent,
empty or null), arguments as an object or as text, content in parts, one call a message, ids of nine letters. Reading a
template cannot tell, so each question is asked once, when a conversation first raises it, by rendering a few words and
looking for them in the prompt. Input: a function that renders. It does not know real messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.tokenizer.messages import Message

Render = Callable[[Sequence[Message], bool], str | None]
"""Messages, and whether a tool is offered -> the prompt, or None where the template fails."""
Absence = Literal["absent", "empty", "null"]

_ABSENT: dict[str, Mapping[str, Any]] = {"absent": {}, "empty": {"content": ""}, "null": {"content": None}}
_SHORT_ID, _LONG_ID = "abcde1234", "call_0123456789abcdefghijklmn"
_NAME, _KEY, _VALUE, _TEXTS = "probe_name", "probe_key", "probe_value", ("firstprobe", "secondprobe")
_SHOWN = 4  # the rank of a spelling that shows the arguments at all
_QUESTION = {"role": "user", "content": "probe question"}


@dataclass(frozen=True, slots=True)
class CallShape:
    """How an assistant's message with tool calls is written.

    Attributes:
        content: what stands for no content.
        text_arguments: arguments are JSON text rather than objects.
        shows_calls: the calls reach the prompt at all.
    """

    content: Absence
    text_arguments: bool
    shows_calls: bool


class Dialect:
    """The answers for one template.

    Args:
        render: tries a conversation.
        literals: the texts that the template compares with or looks up, such as names of roles and fields.
    """

    def __init__(self, render: Render, literals: frozenset[str]) -> None:
        self._try = render
        self.knows_developer = "developer" in literals
        self.reads_only_reasoning = "reasoning" in literals and not literals & {"reasoning_content", "thinking"}
        self.reads_parts = functools.cache(self._reads_parts)
        self.reads_text = functools.cache(self._reads_text)
        self.call_shape = functools.cache(self._call_shape)

    def _reads_parts(self, role: str) -> bool:
        """Whether content may stay a list: every part is shown, and none as a printed object."""
        text = self._shown(role, [{"type": "text", "text": word} for word in _TEXTS])
        printed = text is not None and any(quote + word in text for word in _TEXTS for quote in "'\"")
        return text is not None and all(word in text for word in _TEXTS) and not printed

    def _reads_text(self, role: str) -> bool:
        """Whether content may be text; a few templates show parts only."""
        text = self._shown(role, _TEXTS[0])
        return (text is not None and _TEXTS[0] in text) or not self.reads_parts(role)

    def _shown(self, role: str, content: Any) -> str | None:
        message = {"role": role, "content": content}
        if role in ("system", "developer"):
            return self._try([message, _QUESTION], False)
        if role == "assistant":
            return self._try([_QUESTION, message, _QUESTION], False)
        if role == "user":
            return self._try([message], False)
        return self._try([_QUESTION, self._call(), {**_result(_SHORT_ID), "role": role, "content": content}], True)

    @functools.cached_property
    def empty_answer(self) -> Absence:
        """What stands for no content in an assistant's message without calls."""
        for absence in ("absent", "empty"):
            if self._try([_QUESTION, {"role": "assistant", **_ABSENT[absence]}, _QUESTION], False) is not None:
                return absence
        return "empty"

    def _call_shape(self, first: Absence) -> CallShape:
        """The spelling in which a call is shown best; `first` is tried first and wins a tie."""
        absences: list[Absence] = [first, *(a for a in ("absent", "empty", "null") if a != first)]
        shapes = [CallShape(absence, text, True) for absence in absences for text in (False, True)]
        ranked = [(self._rank(shape), -n, shape) for n, shape in enumerate(shapes)]
        rank, _, best = max(ranked, key=lambda entry: entry[:2])
        return CallShape(best.content, best.text_arguments, rank >= _SHOWN)

    def _rank(self, shape: CallShape) -> int:
        text = self._try([_QUESTION, _call_message(shape, [_SHORT_ID]), _result(_SHORT_ID)], True)
        if text is None:
            return -1
        # Objects printed by Python, JSON text quoted once more, and a printed null are worse than their opposites.
        ugly = f"'{_KEY}'" in text or f'\\"{_KEY}' in text or "None" in text
        return _SHOWN * (_VALUE in text) + 2 * (_NAME in text) + (not ugly)

    def _call(self, **others: Any) -> Message:
        return _call_message(self.call_shape("absent"), [_SHORT_ID]) | others

    @functools.cached_property
    def takes_raw_arguments(self) -> bool:
        """Whether arguments that are no JSON object may be given as the text they are."""
        call = self._call()
        call["tool_calls"][0]["function"]["arguments"] = _VALUE
        text = self._try([_QUESTION, call, _result(_SHORT_ID)], True)
        return text is not None and (_VALUE in text or not self.call_shape("absent").shows_calls)

    @functools.cached_property
    def wants_short_ids(self) -> bool:
        """Whether ids of calls must be nine letters and digits, as Mistral's templates demand."""
        shape = self.call_shape("absent")
        short, long = ([_QUESTION, _call_message(shape, [i]), _result(i)] for i in (_SHORT_ID, _LONG_ID))
        return self._try(long, True) is None and self._try(short, True) is not None

    @functools.cached_property
    def wants_result_names(self) -> bool:
        """Whether a tool's result must say which function it is of."""
        named, nameless = _result(_SHORT_ID), _result(_SHORT_ID)
        del nameless["name"]
        start = [_QUESTION, self._call()]
        return self._try([*start, nameless], True) is None and self._try([*start, named], True) is not None

    @functools.cached_property
    def takes_one_call(self) -> bool:
        """Whether a message may hold one call only: a second one fails or is lost, but not in a message of its own."""
        shape, ids = self.call_shape("absent"), [_SHORT_ID, "abcde5678"]
        if not shape.shows_calls:
            return False
        together = self._try([_QUESTION, _call_message(shape, ids), *map(_result, ids)], True)
        apart = [message for i in ids for message in (_call_message(shape, [i]), _result(i))]
        count = (self._try([_QUESTION, *apart], True) or "").count(_VALUE)
        return count > 1 and (together or "").count(_VALUE) < count

    @functools.cached_property
    def takes_reasoning_or_content(self) -> bool:
        """Whether a message with calls may have reasoning or content, not both, as gpt-oss's template demands."""
        both = self._call(content=_TEXTS[0], thinking=_TEXTS[1], reasoning_content=_TEXTS[1])
        one = self._call(thinking=_TEXTS[1], reasoning_content=_TEXTS[1])
        tried = [self._try([_QUESTION, call, _result(_SHORT_ID)], True) for call in (both, one)]
        return tried[0] is None and tried[1] is not None


def _call_message(shape: CallShape, ids: Sequence[str]) -> Message:
    arguments = f'{{"{_KEY}": "{_VALUE}"}}' if shape.text_arguments else {_KEY: _VALUE}
    calls = [{"id": i, "type": "function", "function": {"name": _NAME, "arguments": arguments}} for i in ids]
    return {"role": "assistant", **_ABSENT[shape.content], "tool_calls": calls}


def _result(call_id: str) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "name": _NAME, "content": "probe result"}


PROBE_TOOL = {
    "type": "function",
    "function": {"name": "another", "description": "a", "parameters": {"type": "object", "properties": {}}},
}
