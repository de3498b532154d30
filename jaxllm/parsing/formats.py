"""What a format is: how a model marks its thoughts and its calls, and the machine that reads an answer so marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.parsing.events import NewId, Reasoning, Text, Tools, call_id
from jaxllm.parsing.grammar import Written
from jaxllm.parsing.json_text import json_calls
from jaxllm.parsing.source import Source, Steps

Block = Callable[[Source, str, Tools, NewId], Steps[bool]]
"""Reads what follows an opening marker (the second argument); false, before any event, if that is no call."""

Whole = Callable[[Source, Tools], Steps[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a model writes calls.

    Attributes:
        opens: what begins a call, or several.
        block: reads them from there on.
        markers: every marker that may be a special token of the tokenizer, so that it is kept in the text.
        new_id: makes the id of a call that has none in the text.
        whole: reads the whole answer where thoughts and calls are messages of their own, not marked parts of a text.
        written: how a call is written that must be made: as the first whose `sign` the template has, else as JSON.
    """

    opens: tuple[str, ...]
    block: Block
    markers: tuple[str, ...] = ()
    new_id: NewId = call_id
    whole: Whole | None = None
    written: tuple[Written, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How a model marks what it thinks.

    Attributes:
        starts: what begins a thought; written by the model, or at the end of its prompt.
        ends: what ends it.
        from_start: an answer is a thought until one of `ends`, if the prompt says nothing else.
        whole: as in `CallFormat`.
        markers: as in `CallFormat`.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    from_start: bool = False
    whole: Whole | None = None
    markers: tuple[str, ...] = ()

    def is_open(self, prompt: str) -> bool:
        """Whether an answer to `prompt` begins within a thought."""
        tail = prompt.rstrip()
        return tail.endswith(self.starts) or (self.from_start and not tail.endswith(self.ends))


def no_block(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    yield from ()
    return False


NO_CALLS = CallFormat(opens=(), block=no_block)
NO_THOUGHTS = Thinking(starts=(), ends=())


def read_answer(
    src: Source, thinking: Thinking, calls: CallFormat, tools: Tools, *, opened: bool, forced: bool = False
) -> Steps[None]:
    """Read a whole answer. Calls count within thoughts too; a thought begins only before the text, or after a call.

    What follows a marker and is no call is text, and so is the marker; reading goes on behind it. A forced answer may
    be a call as plain JSON.
    """
    whole = thinking.whole or calls.whole
    if whole is not None:
        if not forced or not (yield from _plain_call(src, tools, calls.new_id)):
            yield from whole(src, tools)
        return
    if opened:
        yield from src.spaces()
        yield from src.take(*thinking.starts)
    thinks, at_start = opened, not opened
    while True:
        if at_start:
            gap = yield from src.spaces()
            at_start, thinks = False, bool((yield from src.take(*thinking.starts)))
            if forced and not thinks and "{" not in calls.opens and (yield from _plain_call(src, tools, calls.new_id)):
                at_start = True
                continue
            if gap and not thinks:
                yield Text(gap)
        kind = Reasoning if thinks else Text
        marker = yield from src.until(calls.opens + (thinking.ends if thinks else ()), kind)
        if not marker:
            return
        if thinks and marker in thinking.ends:
            thinks, at_start = False, True
            continue
        mark = src.pos
        if (yield from calls.block(src, marker, tools, calls.new_id)):
            at_start = not thinks
        else:
            src.pos = mark
            yield kind(marker)


def _plain_call(src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
    mark = src.pos
    yield from src.spaces()
    called = yield from json_calls(src, tools, new_id)
    if not called:
        src.pos = mark
    return called
