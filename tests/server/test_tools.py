"""Tool calls in text, however the text is cut into pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.server.parsing.events import collect
from jaxllm.server.parsing.registry import AnswerFormat

TOOLS = {"f": {}, "g": {}}
ONE = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "x<"]}}\n</tool_call>'
CASES = [
    ("just text < and <tool", "just text < and <tool", []),
    (ONE, "", [("f", {"a": [1, "x<"]})]),
    (
        "I look.\n" + ONE + "\n" + ONE.replace('"f"', '"g"'),
        "I look.",
        [("f", {"a": [1, "x<"]}), ("g", {"a": [1, "x<"]})],
    ),
    ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
    ("<tool_call>no json</tool_call>", "<tool_call>no json</tool_call>", []),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),
    ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
    ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
]


def parse(name, text, cuts):
    parser, events = AnswerFormat.chosen(None, name).parser(TOOLS), []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += parser.feed(text[start:end])
    answer = collect(events + parser.finish())
    return answer.text, [(call.name, json.loads(call.arguments)) for call in answer.calls]


@pytest.mark.parametrize(("text", "plain", "calls"), CASES)
@given(data=st.data())
def test_hermes_calls_do_not_depend_on_how_text_arrives(text, plain, calls, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert parse("hermes", text, cuts) == (text if plain is None else plain, calls)


LLAMA = [
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
    (
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": 2}}',
        "",
        [("f", {}), ("g", {"b": 2})],
    ),
    ("plain {text}", "plain {text}", []),
    ('{"not": "a call"}', '{"not": "a call"}', []),
    ("", "", []),
]


@pytest.mark.parametrize(("text", "plain", "calls"), LLAMA)
@given(data=st.data())
def test_llama_calls_do_not_depend_on_how_text_arrives(text, plain, calls, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    assert parse("llama3_json", text, cuts) == (plain, calls)


@pytest.mark.parametrize(
    ("template", "name"),
    [("... <tool_call> ...", "hermes"), ("... ipython ...", "llama3_json"), (None, "hermes")],
)
def test_parser_follows_the_template(template, name):
    assert AnswerFormat.chosen(template).calls is AnswerFormat.chosen(None, name).calls


def test_unknown_parser_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"--tool-call-parser is 'herms'; expected one of auto, none, .*hermes, .*llama3_json"
    ):
        AnswerFormat.chosen(None, "herms")
