"""Events as OpenAI's clients read them: the official client's types put a streamed answer together again."""

from __future__ import annotations

import pytest

pytest.importorskip("openai", reason="needs the extra 'test'")

from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion_chunk import ChoiceDelta

from jaxllm.parsing.chat_shapes import Deltas, message
from jaxllm.parsing.events import collect
from tests.parsing.reading import parser_of

ANSWER = (
    '<think>hm</think>I look.\n<tool_call>{"name": "f", "arguments": {"count": 1}}</tool_call>\n'
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
)


def test_a_message_has_thoughts_text_and_calls():
    parser = parser_of("hermes", "qwen3")
    shaped = message(collect(parser.feed(ANSWER) + parser.finish()))
    read = ChatCompletionMessage.model_validate(shaped)
    assert (read.content, shaped["reasoning_content"], shaped["reasoning"]) == ("I look.", "hm", "hm")
    calls = [(call.function.name, call.function.arguments) for call in read.tool_calls or []]
    assert calls == [("f", '{"count": 1}'), ("g", "{}")]


def test_deltas_name_a_call_once_and_number_it():
    parser, deltas, shaped = parser_of("hermes", "qwen3"), Deltas(), []
    for char in ANSWER:
        shaped += deltas.of(parser.feed(char))
    shaped += deltas.of(parser.finish())
    read = [ChoiceDelta.model_validate(delta) for delta in shaped]
    calls = [call for delta in read for call in delta.tool_calls or []]
    assert [(c.index, c.function.name) for c in calls if c.id] == [(0, "f"), (1, "g")]
    assert all(c.function.name is None and c.type is None for c in calls if not c.id)
    arguments = ["".join(c.function.arguments or "" for c in calls if c.index == n) for n in (0, 1)]
    assert arguments == ['{"count": 1}', "{}"] and sum(c.index == 0 for c in calls) > 2
    assert "".join(delta.get("reasoning_content", "") for delta in shaped) == "hm"
    assert "".join(delta.content or "" for delta in read) == "I look."


@pytest.mark.parametrize(
    ("answer", "content"),
    [("", ""), ("hi", "hi"), ("<think>hm", None), ('<tool_call>{"name": "g"}</tool_call>', None)],
)
def test_content_is_null_only_beside_calls_and_thoughts(answer, content):
    parser = parser_of("hermes", "qwen3")
    assert message(collect(parser.feed(answer) + parser.finish()))["content"] == content
