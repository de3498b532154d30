"""Harmony, the format of gpt-oss: an answer is a row of messages, each with a channel and maybe a recipient.

`<|channel|>analysis<|message|>...<|end|>` is a thought, `<|channel|>final<|message|>...` the answer, and
`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>` a call. The prompt ends behind
`<|start|>assistant`.
"""

from __future__ import annotations

import re

from jaxllm.parsing.events import Reasoning, Text, Tools, call_id
from jaxllm.parsing.formats import CallFormat, Thinking, no_block
from jaxllm.parsing.grammar import Written, object_after
from jaxllm.parsing.json_text import named_arguments, whole_call
from jaxllm.parsing.source import Source, Steps

_HEADS = ("<|start|>", "<|channel|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")
_MARKERS = (*_HEADS, *_ENDS, "<|message|>", "<|constrain|>")


def read_harmony(src: Source, tools: Tools) -> Steps[None]:
    """Read a whole answer; what stands outside messages is text."""
    mark = src.pos
    yield from src.spaces()
    in_head = bool((yield from src.take("to=")))
    src.pos = mark
    marker, begun = "", set[type[Text | Reasoning]]()
    while True:
        while not in_head:
            marker = yield from src.until((*_HEADS, *_ENDS), Text)
            if not marker:
                return
            in_head = marker in _HEADS
        head, found = yield from src.capture("<|message|>")
        if not found:
            if not marker:  # no message after all
                yield Text(head)
            return
        marker = yield from _message(src, marker + head, tools, begun)
        in_head = marker in _HEADS


def _message(src: Source, head: str, tools: Tools, begun: set[type[Text | Reasoning]]) -> Steps[str]:
    """Read one message's body and the marker behind it."""
    recipient = _RECIPIENT.search(head)
    name = recipient.group(1) if recipient else ""
    if name in tools:
        yield from src.spaces()
        if not (yield from named_arguments(src, name, call_id())):
            yield from whole_call(name, "{}", call_id)
        return (yield from src.capture(*_HEADS, *_ENDS))[1]
    kind = Reasoning if "<|channel|>analysis" in head else Text
    if kind in begun:
        yield kind("\n\n")
    begun.add(kind)
    return (yield from src.until((*_HEADS, *_ENDS), kind))


_CALL = Written(
    call=object_after("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>"),
    between=None,
)
HARMONY = CallFormat(opens=(), block=no_block, markers=_MARKERS, whole=read_harmony, written=(_CALL,))
HARMONY_THINKING = Thinking(starts=(), ends=(), markers=_MARKERS, whole=read_harmony)
