"""Histories as OpenAI clients send them reach each template in the spelling that it takes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from jaxllm.tokenizer.chat_template import ChatTemplate

ARGUMENTS = {"city": "Köln", "days": 2}
QUESTION = {"role": "user", "content": "How is it there?"}
TOOLS = [{"type": "function", "function": {"name": "forecast", "description": "d", "parameters": {"type": "object"}}}]
# Each template shows a call in its own way, and fails or loses it where it is spelled in another.
CALL = "{% for c in m.tool_calls %}[{{ c.function.name }}:{{ c.function.arguments | tojson }}]{% endfor %}"
TEXT_CALL = "{% for c in m.tool_calls %}{{ '[' + c.function.name + ':' + c.function.arguments + ']' }}{% endfor %}"
STYLES = {
    "ignores calls and adds content": "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ';' }}{% endfor %}",
    "looks into content": (
        "{% for m in messages %}{% if '</think>' in m.content %}T{% endif %}{{ m.role + ':' + m.content }}"
        "{% if m.tool_calls %}" + CALL + "{% endif %};{% endfor %}"
    ),
    "asks whether content is there": (
        "{% for m in messages %}{{ m.role }}:{% if 'content' in m %}{% if '<' in m.content %}T{% endif %}{% endif %}"
        "{% if 'tool_calls' in m %}" + CALL + "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    ),
    "wants null content and text": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}assistant:"
        + TEXT_CALL
        + ";{% else %}{{ m['role'] + ':' + m['content'] + ';' }}{% endif %}{% endfor %}"
    ),
    "walks through arguments": (
        "{% for m in messages %}{{ m.role }}:{% if m.tool_calls %}{% for c in m.tool_calls %}"
        "[{{ c.function.name }}:{{ '{' }}"
        "{% for k, v in c.function.arguments.items() %}{{ k | tojson }}: {{ v | tojson }}"
        "{{ ', ' if not loop.last }}{% endfor %}}]{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    ),
    "prints the text of arguments": (
        "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "[{{ c.function.name }}:{{ c.function.arguments }}]{% endfor %};{% endfor %}"
    ),
}


def call(
    arguments: Any = None, name: str = "forecast", call_id: str = "call_7Gq0aZpLk3", **message: Any
) -> dict[str, Any]:
    text = json.dumps(ARGUMENTS, ensure_ascii=False) if arguments is None else arguments
    entry = {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
    return {"role": "assistant", "tool_calls": [entry], **message}


def result(content: Any = "dry", call_id: str = "call_7Gq0aZpLk3") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def render(source: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    return ChatTemplate(source, {}).render(messages, **arguments)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}], ids=["null", "absent", "empty"])
@pytest.mark.parametrize("arguments", [None, ARGUMENTS], ids=["text", "object"])
@pytest.mark.parametrize("style", STYLES)
def test_call_without_content_is_shown_once_with_its_arguments_as_json(style, content, arguments):
    text = render(STYLES[style], [QUESTION, call(arguments, **content), result()], tools=TOOLS)
    shown = "" if style == "ignores calls and adds content" else '[forecast:{"city": "Köln", "days": 2}]'
    assert text == f"user:How is it there?;assistant:{shown};tool:dry;"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sent", ['{"city": Köln', "[1]", "7", "city=Köln", "{" * 3000])
def test_arguments_that_are_no_object_do_not_end_the_conversation(style, sent):
    text = render(STYLES[style], [QUESTION, call(sent), result("arguments are not JSON")], tools=TOOLS)
    if style != "ignores calls and adds content":
        assert sent in text or json.dumps(sent, ensure_ascii=False)[1:-1] in text
    assert text.endswith("tool:arguments are not JSON;")


@pytest.mark.parametrize("sent", ["", "  ", "null", "{}"])
def test_no_arguments_are_an_empty_object(sent):
    assert "[forecast:{}]" in render(STYLES["looks into content"], [QUESTION, call(sent), result()])


def test_call_keeps_the_text_that_stands_beside_it():
    text = render(STYLES["looks into content"], [QUESTION, call(content="I look it up."), result()])
    assert "assistant:I look it up.[forecast:" in text


@pytest.mark.parametrize("answer", [{"content": None}, {}, {"content": ""}, {"content": []}])
@pytest.mark.parametrize("style", STYLES)
def test_answer_without_content_is_an_empty_one(style, answer):
    messages = [QUESTION, {"role": "assistant", **answer}, {"role": "user", "content": "Hello?"}]
    assert render(STYLES[style], messages) == "user:How is it there?;assistant:;user:Hello?;"


def test_function_that_returned_nothing_gives_an_empty_result():
    assert render(STYLES["looks into content"], [QUESTION, call(), result(None)]).endswith("tool:;")


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


READS_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %};{% endfor %}"
)
ONLY_PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p['text'] }}{% endfor %};{% endfor %}"
USERS_PARTS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
)
TEXT_ONLY = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize(
    ("source", "system", "user"),
    [
        (READS_PARTS, "ab", "cd"),
        (ONLY_PARTS, "ab", "cd"),
        (USERS_PARTS, "a\nb", "cd"),
        (TEXT_ONLY, "a\nb", "c\nd"),
        ("{% for m in messages %}{{ m.role }}:{{ m.content | tojson }};{% endfor %}", '"a\\nb"', '"c\\nd"'),
    ],
)
def test_parts_go_to_templates_that_read_them_and_are_lines_of_text_otherwise(source, system, user):
    messages = [{"role": "system", "content": parts("a", "b")}, {"role": "user", "content": parts("c", "d")}]
    assert render(source, messages) == f"system:{system};user:{user};"


def test_text_goes_as_a_part_to_a_template_that_reads_nothing_else():
    assert render(ONLY_PARTS, [QUESTION]) == "user:How is it there?;"


@pytest.mark.parametrize("content", ["dry", parts("dry")])
@pytest.mark.parametrize("style", STYLES)
def test_results_are_text_or_parts(style, content):
    assert render(STYLES[style], [QUESTION, call(), result(content)]).endswith("tool:dry;")


def test_developer_is_system_where_the_template_does_not_know_it():
    messages = [{"role": "developer", "content": "Rhyme."}, QUESTION]
    assert render(TEXT_ONLY, messages).startswith("system:Rhyme.;")
    knows = TEXT_ONLY + "{% if messages[0].role == 'developer' %}!{% endif %}"
    assert render(knows, messages).startswith("developer:Rhyme.;")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_reaches_the_template_under_the_name_it_reads(name, read):
    source = "{% for m in messages %}{{ m." + read + " or '-' }};{% endfor %}"
    assert render(source, [QUESTION, call(**{name: "Look it up."}), result()]) == "-;Look it up.;-;"


def test_template_that_takes_reasoning_or_content_gets_both_in_one():
    source = (
        "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('not both') }}"
        "{% endif %}{{ m.role }}:{{ m.thinking or m.content }};{% endfor %}"
    )
    sent = call(content="I look.", reasoning="Unknown city.")
    assert (
        render(source, [QUESTION, sent, result()])
        == "user:How is it there?;assistant:Unknown city.\n\nI look.;tool:dry;"
    )


ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call') }}"
    "{% endif %}{{ m.tool_calls[0].function.arguments | tojson }};{% else %}{{ m.content }};{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [ONE_CALL, ONE_CALL.replace("raise_exception", "''.strip")], ids=["fails", "loses"])
def test_parallel_calls_become_messages_of_their_own_where_a_template_takes_one(source):
    both = call('{"n": 1}', call_id="a")
    both["tool_calls"] += call('{"n": 2}', call_id="b")["tool_calls"]
    messages = [QUESTION, both, result("two", "b"), result("one", "a"), {"role": "user", "content": "And?"}]
    assert render(source, messages) == 'How is it there?;{"n": 1};one;{"n": 2};two;And?;'


def test_parallel_calls_stay_together_where_a_template_takes_them():
    both = call('{"n": 1}', call_id="a", content=None)
    both["tool_calls"] += call('{"n": 2}', call_id="b")["tool_calls"]
    text = render(STYLES["looks into content"], [QUESTION, both, result("one", "a"), result("two", "b")])
    assert text.endswith('assistant:[forecast:{"n": 1}][forecast:{"n": 2}];tool:one;tool:two;')


def test_ids_become_nine_letters_where_a_template_wants_that_and_still_match():
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
        "{{ raise_exception('nine') }}{% endif %}{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}"
        "{% if m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
        "{{ ' ' + m.tool_call_id }}{% endif %}{% endfor %}"
    )
    call_id, result_id = render(source, [QUESTION, call("{}"), result()]).removeprefix("{}").split()
    assert call_id == result_id != "call_7Gq0"
    fits = call("{}", call_id="abcDEF123"), result(call_id="abcDEF123")
    assert render(source, [QUESTION, *fits]) == "{}abcDEF123 abcDEF123"


def test_result_says_its_function_where_a_template_needs_the_name():
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }};{% endfor %}"
        "{% if m.role == 'tool' %}{{ m.name + '=' + m.content }}{% endif %}{% endfor %}"
    )
    assert render(source, [QUESTION, call(), result()]) == "forecast;forecast=dry"


def test_what_was_sent_is_left_alone():
    messages = [QUESTION, call(content=None), result(parts("dry"))]
    before = copy.deepcopy(messages)
    for source in STYLES.values():
        render(source, messages, tools=TOOLS)
    assert messages == before


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}",
            [QUESTION, call(), result()],
            r"refused these messages: no tools \(at messages\[2\] \(role 'tool'\)\)",
        ),
        ("{{ messages[0].content.what.ever }}", [QUESTION], r"messages\[0\].*needs 'what'.*--chat-template"),
        ("{{ missing + 'x' }}", [QUESTION], r"needs 'missing' is undefined; set it in chat_template_kwargs"),
        ("{{ 1 + messages[0].content }}", [QUESTION], r"cannot render messages\[0\] \(role 'user'\): .*--chat-templ"),
        ("{{ messages[2].content + 1 }}", [QUESTION] * 3, r"cannot render"),
    ],
)
def test_failure_names_the_message_and_what_to_do_without_python_words(source, messages, words):
    with pytest.raises(ValueError, match=words) as caught:
        render(source, messages)
    for word in ("TypeError", "NoneType", "object has", "Undefined", "Traceback", "dict object", "\n"):
        assert word not in str(caught.value)
