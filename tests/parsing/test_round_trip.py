"""A call that a chat template writes into the history is read back as it was, for templates of each format."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.parsing.registry import AnswerFormat
from jaxllm.tokenizer.chat_template import ChatTemplate
from tests.parsing.reading import TOOLS, outline, read

VALUE = "{{ value if value is string else value | tojson }}"
# Each writes one call from `name` and `arguments`; what is around a block of calls stands in WRAPPED.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "{{ name }}", "arguments": {{ arguments | tojson }}}\n</tool_call>\n',
    "llama3_json": '{"name": "{{ name }}", "parameters": {{ arguments | tojson }}};',
    "granite": '<|tool_call|>[{"name": "{{ name }}", "arguments": {{ arguments | tojson }}}]\n',
    "mistral": "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments | tojson }}",
    "deepseek_v3": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ name }}\n```json\n{{ arguments | tojson }}\n```"
    "<｜tool▁call▁end｜>",
    "deepseek_v31": "<｜tool▁call▁begin｜>{{ name }}<｜tool▁sep｜>{{ arguments | tojson }}<｜tool▁call▁end｜>",
    "deepseek_v32": '<｜DSML｜invoke name="{{ name }}">\n{% for key, value in arguments.items() %}'
    '<｜DSML｜parameter name="{{ key }}" string="{{ "true" if value is string else "false" }}">'
    + VALUE
    + "</｜DSML｜parameter>\n{% endfor %}</｜DSML｜invoke>\n",
    "kimi_k2": "<|tool_call_begin|>functions.{{ name }}:0<|tool_call_argument_begin|>{{ arguments | tojson }}"
    "<|tool_call_end|>",
    "qwen3_coder": "<tool_call>\n<function={{ name }}>\n{% for key, value in arguments.items() %}"
    "<parameter={{ key }}>\n" + VALUE + "\n</parameter>\n{% endfor %}</function>\n</tool_call>\n",
    "minimax_m2": '<invoke name="{{ name }}">\n{% for key, value in arguments.items() %}'
    '<parameter name="{{ key }}">' + VALUE + "</parameter>\n{% endfor %}</invoke>\n",
    "glm45": "<tool_call>{{ name }}\n{% for key, value in arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>" + VALUE + "</arg_value>\n{% endfor %}</tool_call>",
    "seed_oss": "<seed:tool_call>\n<function={{ name }}>\n{% for key, value in arguments.items() %}"
    "<parameter={{ key }}>" + VALUE + "</parameter>\n{% endfor %}</function>\n</seed:tool_call>",
    "openai": "<|start|>assistant<|channel|>commentary to=functions.{{ name }} <|constrain|>json<|message|>"
    "{{ arguments | tojson }}<|call|>",
}
WRAPPED = {
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v31": ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    "deepseek_v32": ("<｜DSML｜function_calls>\n", "</｜DSML｜function_calls>"),
    "kimi_k2": ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    "minimax_m2": ("<minimax:tool_call>\n", "</minimax:tool_call>"),
}
LOOP = (
    "{% for call in messages[-1].tool_calls %}{% set name = call.function.name %}"
    "{% set arguments = call.function.arguments %}"
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["", "5", "null", "true", '{"a": 1}', '"', "\\", "a\nb\n", " x ", "<b>", "</", "<tool_call>", "é\u2028\x7f"]
)
numbers = st.integers(-(10**12), 10**12)
values = st.recursive(texts | numbers | st.booleans() | st.none(), lambda v: st.lists(v, max_size=3), max_leaves=5)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": texts,
        "count": numbers,
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "items": st.lists(values, max_size=3),
        "more": st.dictionaries(texts, values, max_size=3),
        "choice": st.sampled_from(["a", "b"]),
        "node": st.just({"next": {}}),
    },
)


def written(name: str, calls: list[dict]) -> str:
    begin, end = WRAPPED.get(name, ("", ""))
    template = ChatTemplate(f"{begin}{LOOP}{WRITTEN[name]}{{% endfor %}}{end}", {})
    tool_calls = [
        {"id": str(n), "type": "function", "function": {"name": "f", "arguments": json.dumps(call)}}
        for n, call in enumerate(calls)
    ]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": tool_calls}]
    return template.render(messages)


@pytest.mark.parametrize("name", sorted(WRITTEN))
@settings(max_examples=25, deadline=None)
@given(calls=st.lists(arguments, min_size=1, max_size=2), data=st.data())
def test_a_written_call_is_read_back(name, calls, data):
    answer = written(name, calls)
    cut = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[a:b] for a, b in zip([0, *cut], [*cut, len(answer)], strict=True)]
    parsed = read(AnswerFormat.chosen(None, name, "none").parser(TOOLS), pieces)
    assert outline(parsed) == ("", "", [("f", call) for call in calls])
