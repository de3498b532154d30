"""Rendering equals what models were trained on; bad input is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from jaxllm.tokenizer.chat_template import ALLOWED_VARIABLES, ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_LIKE = """
{%- set ns = namespace(first=true) -%}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif -%}
{{- bos_token }}
{%- for message in messages %}
    {%- set text = '<|start|>' ~ message.role ~ '<|end|>\n\n' ~ message.content | trim ~ '<|eot|>' %}
    {%- if ns.first %}{{- 'Date: ' ~ date_string ~ '\n' }}{% set ns.first = false %}{% endif %}
    {{- text }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{% endif %}
"""
QWEN_LIKE = """
{%- macro call_text(call) -%}
<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}{{ "\\n" }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages | rejectattr('role', 'equalto', 'system') %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}
        {%- for call in message.tool_calls %}{{ call_text(call) }}{% endfor %}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- elif '</think>' in message.content %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') }}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {%- if message.content == 'skip' %}{% continue %}{% endif %}
        {{- ['<|im_start|>', message.role, '\\n', message.content, '<|im_end|>\\n'] | join }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}
"""
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "Größe <b>&</b>", "parameters": {}}}]
CALL = {"type": "function", "id": "1", "function": {"name": "wetter", "arguments": {"ort": "Köln", "n": 1}}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "  Grüße 😀 "},
    {"role": "user", "content": "skip"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"grad": 3}'},
    {"role": "assistant", "content": "<think>hm</think>\n3 Grad"},
    {"role": "user", "content": "Danke"},
]
SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}


def render(source: str, messages: Any = MESSAGES, **arguments: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, **arguments)


@pytest.fixture(scope="module")
def reference():
    """transformers' renderer, for the same arguments."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")

    def rendered(source: str, messages: Any, tools: Any, prompt: bool, **variables: Any) -> str:
        texts, _ = module.render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            **variables,
            **SPECIAL,
        )
        return texts[0]

    return rendered


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    ("source", "tools", "variables"),
    [
        (CHATML, None, {}),
        (LLAMA3_LIKE, None, {}),
        (LLAMA3_LIKE, None, {"date_string": "today"}),
        (QWEN_LIKE, None, {}),
        (QWEN_LIKE, TOOLS, {}),
        (QWEN_LIKE, TOOLS, {"enable_thinking": False}),
    ],
)
def test_rendering_equals_transformers(reference, source, tools, variables, prompt):
    ours = render(source, tools=tools, variables=variables, add_generation_prompt=prompt)
    assert ours == reference(source, MESSAGES, tools, prompt, **variables)


CONTINUED = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one, two, "}]


READS_PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}</>{% endfor %}"
)
TWO_PARTS = [{"type": "text", "text": "one "}, {"type": "text", "text": "two "}]


@pytest.mark.parametrize(
    ("source", "content"),
    [
        *((source, content) for source in (CHATML, LLAMA3_LIKE, QWEN_LIKE) for content in ("one, two, ", " one")),
        (READS_PARTS, TWO_PARTS),
        (READS_PARTS.replace("part.text", "part.text | trim"), TWO_PARTS),
    ],
)
def test_continued_message_ends_where_transformers_ends_it(reference, source, content):
    messages = [CONTINUED[0], {"role": "assistant", "content": content}]
    ours = render(source, messages, continue_final_message=True)
    assert ours == reference(source, messages, None, False, continue_final_message=True)
    assert ours.rstrip().endswith(("one, two,", "one", "two"))


@pytest.mark.parametrize(
    ("messages", "source", "message"),
    [
        ([CONTINUED[0], {"role": "assistant", "content": ""}], CHATML, "needs text in the last message"),
        ([CONTINUED[0], {"role": "assistant", "content": None}], CHATML, "needs text in the last message"),
        (CONTINUED, "{{ messages[0].content }}", "does not show the end of the last message"),
    ],
)
def test_nothing_to_continue_is_refused(messages, source, message):
    with pytest.raises(ValueError, match=message):
        render(source, messages, continue_final_message=True)


def test_continuing_and_beginning_an_answer_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        render(CHATML, CONTINUED, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize("argument", [["x"], [1, "x"]])
def test_text_is_formatted_with_plain_fields(reference, argument):
    source = "{{ '{} {0}'.replace(' {0}', '').format(*tools[0].a) }}{{ '<a{x}>'.format(x=tools[0].a[0]) }}"
    assert render(source, tools=[{"a": argument}]) == reference(source, MESSAGES, [{"a": argument}], True)


SAFE = "{{ messages[0].content + (tools[0].a | safe) }}{{ (tools[0].a | safe) ~ '<' }}{{ tools[0].a | safe }}"


def test_filter_safe_escapes_what_it_is_added_to_as_in_transformers(reference):
    messages, tools = [{"role": "user", "content": '<b> & "'}], [{"a": "<i>"}]
    ours = render(SAFE, messages, tools=tools)
    assert ours == reference(SAFE, messages, tools, True)
    assert ours.startswith("&lt;b&gt; ") and ours.endswith("<i><<i>")


def test_answer_of_the_openai_client_may_be_put_back_as_it_is():
    chat = pytest.importorskip("openai").types.chat
    answer = chat.ChatCompletionMessage(role="assistant", content="<think>x</think>yes")
    text = render(QWEN_LIKE, [MESSAGES[0], answer], add_generation_prompt=False)
    assert text == "<|im_start|>assistant\nyes<|im_end|>\n"


def test_json_keeps_non_ascii_and_html_characters():
    assert render("{{ tools | tojson }}", tools=TOOLS).count("Größe <b>&</b>") == 1


def test_text_parts_are_joined_by_newlines():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


def test_arguments_sent_as_json_text_are_printed_once_not_twice():
    sent = {"function": {"name": "f", "arguments": '{"x": "ü"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [sent]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", messages) == '{"x": "ü"}'
    assert sent["function"]["arguments"] == '{"x": "ü"}'  # the caller's message is left alone


def test_reasoning_is_found_under_the_name_that_templates_read():
    messages = [{"role": "assistant", "content": "a", "reasoning": "r"}]
    assert render("{{ messages[0].reasoning_content }}", messages) == "r"


def test_date_function_formats_today():
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_no_tools_and_an_empty_list_of_tools_are_the_same():
    assert render("{{ tools is none }}", tools=[]) == render("{{ tools is none }}", tools=None) == "True"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is an empty list"),
        ("hi", "messages is str"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"content": "x"}], "role None; expected one of system, developer, user"),
        (
            [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}],
            r"messages\[1\] has role 'robot'",
        ),
        ([{"role": ["user"], "content": "x"}], "has role"),
        ([{"role": "user"}], "has no content; give text"),
        ([{"role": "user", "content": 3}], "content of type int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is 'image_url'; .*only text"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object; expected JSON values"),
        ([{"role": "assistant", "tool_calls": [3]}], "tool_calls must be a list of JSON objects"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}], "no function with a name"),
    ],
)
def test_bad_messages_are_refused_in_one_line(messages: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        render(CHATML, messages)
    assert "\n" not in str(caught.value)


def test_deeply_nested_input_is_refused():
    nested: Any = "x"
    for _ in range(500):
        nested = [nested]
    with pytest.raises(ValueError, match="levels deep"):
        render(CHATML, [{"role": "user", "content": "x", "extra": nested}])


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "add_generation_prompt", "chat_template", "x"])
def test_variables_outside_the_list_are_refused_by_name(name: str):
    assert name not in ALLOWED_VARIABLES
    with pytest.raises(ValueError, match=f"variables {name} are not allowed; expected any of .*enable_thinking"):
        render(CHATML, variables={name: "x"})


def test_tools_that_are_not_objects_are_refused():
    with pytest.raises(ValueError, match="tools must be a list of function definitions"):
        render(CHATML, tools=["f"])


def test_what_the_template_objects_to_is_passed_on():
    with pytest.raises(ValueError, match="refused these messages: roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}")


def test_a_template_cannot_change_the_messages():
    with pytest.raises(ValueError, match="unsafe"):
        render("{{ messages.append(1) }}")
    with pytest.raises(ValueError, match="unsafe"):
        render("{{ messages[0].update({'role': 'x'}) }}")
