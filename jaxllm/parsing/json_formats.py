"""Formats whose arguments are a JSON object: with the function's name in it (Hermes and most others), or before it."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from jaxllm.parsing.events import NewId, Tools
from jaxllm.parsing.formats import CallFormat
from jaxllm.parsing.grammar import Written, named_object, object_after
from jaxllm.parsing.json_text import json_calls, named_arguments
from jaxllm.parsing.source import Source, Steps


def objects(*opens: str, close: str = "", written: tuple[Written, ...] = ()) -> CallFormat:
    """Objects with a name and arguments, or arrays of them, one or several between two markers.

    The end marker may be missing. An opening marker that is a bracket belongs to the JSON.
    """

    def block(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
        src.pos -= len(opened_by) if opened_by in ("{", "[") else 0
        called = False
        while True:
            mark = src.pos
            yield from _gap(src, called)
            if called and ((close and (yield from src.take(close))) or not (yield from src.next_char())):
                return True
            if not (yield from json_calls(src, tools, new_id)):
                src.pos = mark
                return called
            called = True

    markers = tuple(m for m in (*opens, close) if len(m) > 1)
    return CallFormat(opens=opens, block=block, markers=markers, written=written)


def _gap(src: Source, after_call: bool) -> Steps[None]:
    """White space, and between calls what sets them apart or, a common slip, closes a bracket too many."""
    yield from src.spaces()
    while after_call and (yield from src.take(",", ";", "}", "]")):
        yield from src.spaces()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Markers of a format that writes the name before the arguments, several calls in one section.

    Attributes:
        before_name: what may stand between `call` and the name.
        after_name: what stands between the name and its arguments, one of these.
        numbered: `:` and a number follow the name; with what is before, they are the call's id.
    """

    begin: str
    end: str
    call: str
    call_end: str
    before_name: str
    after_name: tuple[str, ...]
    numbered: bool = False

    def format(self, *written: Written) -> CallFormat:
        """The format so marked."""
        markers = (self.begin, self.end, self.call, self.call_end, self.before_name, *self.after_name)
        specials = tuple(m for m in markers if m.startswith("<"))
        return CallFormat(opens=(self.begin, self.call), block=self._block, markers=specials, written=written)

    def _block(self, src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
        called, opened = False, opened_by == self.call
        while True:
            mark = src.pos
            yield from src.spaces()
            if not opened and called and (yield from src.take(self.end)):
                return True
            if not opened and not (yield from src.take(self.call)):
                src.pos = mark
                return called
            if not (yield from self._call(src, tools, new_id)):
                src.pos = mark
                return called
            called, opened = True, False

    def _call(self, src: Source, tools: Tools, new_id: NewId) -> Steps[bool]:
        yield from src.spaces()
        before = yield from src.take(self.before_name)
        name = yield from src.take(*tools)
        if not name:
            return False
        number = (yield from self._number(src)) if self.numbered else ""
        yield from src.spaces()
        if not (yield from src.take(*self.after_name)):
            return False
        given = f"{before}{name}:{number}" if number else new_id()
        if not (yield from named_arguments(src, name, given)):
            return False
        mark = src.pos
        yield from src.spaces()
        yield from src.take("```")
        yield from src.spaces()
        if not (yield from src.take(self.call_end)):
            src.pos = mark
        return True

    def _number(self, src: Source) -> Steps[str]:
        digits = ""
        if (yield from src.take(":")):
            while (yield from src.next_char()).isdigit():
                digits += yield from src.next_char()
                src.pos += 1
        return digits


def _mistral(src: Source, opened_by: str, tools: Tools, new_id: NewId) -> Steps[bool]:
    """`name[ARGS]{...}`, in some with `[CALL_ID]...` before the arguments, or an array of objects."""
    yield from src.spaces()
    name = yield from src.take(*tools)
    if not name:
        return (yield from json_calls(src, tools, new_id))
    given = ""
    if (yield from src.take("[CALL_ID]")):
        given, _ = yield from src.capture("[ARGS]")
    yield from src.take("[ARGS]")
    return (yield from named_arguments(src, name, given.strip() or new_id()))


def _mistral_id() -> str:
    """Nine letters and digits, which the templates insist on."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


HERMES = objects(
    "<tool_call>",
    close="</tool_call>",
    written=(Written(call=named_object("<tool_call>\n", "\n</tool_call>")),),
)
LLAMA3 = objects("<|python_tag|>", "{", written=(Written(call=named_object("", "", "parameters"), between="; "),))
GRANITE = objects(
    "<|tool_call|>",
    "<tool_call>",
    close="</tool_call>",
    written=(Written(begin="<|tool_call|>[", call=named_object("", ""), between=", ", end="]", sign="<|tool_call|>"),),
)
TOOL_CALLS = objects("<tool_calls>", close="</tool_calls>")
MISTRAL = CallFormat(
    opens=("[TOOL_CALLS]",),
    block=_mistral,
    markers=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    new_id=_mistral_id,
    written=(
        Written(call=object_after("[TOOL_CALLS]", "[ARGS]"), between="", sign="[ARGS]"),
        Written(begin="[TOOL_CALLS][", call=named_object("", ""), between=", ", end="]"),
    ),
)
_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
DEEPSEEK = Section(
    begin=_BEGIN,
    end=_END,
    call=_CALL,
    call_end=_CALL_END,
    before_name=f"function{_SEPARATOR}",
    after_name=(_SEPARATOR, "```json"),
).format(
    Written(
        begin=_BEGIN,
        call=object_after(f"{_CALL}function{_SEPARATOR}", "\n```json\n", f"\n```{_CALL_END}"),
        end=_END,
        sign="```json",
    ),
    Written(begin=_BEGIN, call=object_after(_CALL, _SEPARATOR, _CALL_END), between="", end=_END),
)
KIMI = Section(
    begin="<|tool_calls_section_begin|>",
    end="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    call_end="<|tool_call_end|>",
    before_name="functions.",
    after_name=("<|tool_call_argument_begin|>",),
    numbered=True,
).format(
    Written(
        begin="<|tool_calls_section_begin|>",
        call=object_after(
            "<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>", numbered=True
        ),
        between="",
        end="<|tool_calls_section_end|>",
    )
)
