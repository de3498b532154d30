"""Calls and thoughts of every format, cut at every character."""

from __future__ import annotations

import pytest

from jaxllm.parsing.events import CallArguments, CallEnd, CallStart, Text, collect, joined
from jaxllm.parsing.registry import AnswerFormat
from jaxllm.parsing.table import CALL_FORMATS, THINKING
from tests.parsing.reading import TOOLS, cuts, outline, parser_of, read

F = '{"name": "f", "arguments": {"count": 1, "items": ["x<", {"}": 2}]}}'
F_CALL = ("f", {"count": 1, "items": ["x<", {"}": 2}]})
G_CALL = ("g", {})

# (format, answer, text, calls); the text of an open call's arguments instead of their value.
HERMES = [
    ("just text < and <tool ", "just text < and <tool ", []),
    (f"<tool_call>\n{F}\n</tool_call>", "", [F_CALL]),
    (f'I look.\n<tool_call>{F}</tool_call>\n<tool_call>{{"name": "g"}}</tool_call>\n', "I look.", [F_CALL, G_CALL]),
    (f"I look.\n<tool_call>{F}</tool_call>\nDone.\n", "I look.\nDone.\n", [F_CALL]),
    (f"<tool_call>{F}", "", [F_CALL]),
    (f"<tool_call>[{F}, {F}]</tool_call>", "", [F_CALL, F_CALL]),
    ('<tool_call>{"arguments": {"a": "}"}, "name": "g"}</tool_call>', "", [("g", {"a": "}"})]),
    ('<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("g", {"a": 1})]),
    ('<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G_CALL]),
    (f'<tool_call>{{"type": "function", "id": "1", "function": {F}}}</tool_call>!', "!", [F_CALL]),
    # Slips of small models: a brace too few or too many, a line end in a string.
    ('<tool_call>{"name": "g", "arguments": {}</tool_call>', "", [G_CALL]),
    ('<tool_call>{"name": "g", "arguments": {}}}</tool_call>', "", [G_CALL]),
    ('<tool_call>{"name": "g", "arguments": {"a": "1\n2\t\\n"}}</tool_call>', "", [("g", {"a": "1\n2\t\n"})]),
    # What only looks like a call stays as it was.
    ("<tool_call>no json</tool_call>", None, []),
    ("<tool_call></tool_call>", None, []),
    ('<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),
    ('<tool_call>{"name": "g", "arguments": [1]}</tool_call>', None, []),
    ("<tool_call>{'name': 'g', 'arguments': {}}</tool_call>", None, []),
    (f"<tool_call><tool_call>{F}</tool_call>", "<tool_call>", [F_CALL]),
    # Cut off by max_tokens.
    ('<tool_call>{"name": "f", "argum', None, []),
    ('<tool_call>{"name": "f", "arguments": {"count": 1, "text": "b\\', "", [("f", '{"count": 1, "text": "b\\')]),
    ("<tool_cal", None, []),
]
OTHERS = [
    ("llama3_json", '{"name": "g", "parameters": {"a": 1}}', "", [("g", {"a": 1})]),
    ("llama3_json", f'<|python_tag|>{F}; {{"name": "g", "parameters": {{}}}}', "", [F_CALL, G_CALL]),
    ("llama3_json", f"Sure: {F} So.", "Sure: So.", [F_CALL]),
    ("llama3_json", 'plain {text} {"name": 1} {"not": "a call"} {', None, []),
    ("granite", f"<|tool_call|>[{F}]", "", [F_CALL]),
    ("jamba", f"<tool_calls>[\n{F},\n{F}\n]</tool_calls>", "", [F_CALL, F_CALL]),
    ("minimax", f"<tool_calls>\n{F}\n{F}\n</tool_calls>ok", "ok", [F_CALL, F_CALL]),
    ("cohere_command3", '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "g", "parameters": {}}\n]'
     "<|END_ACTION|>", "", [G_CALL]),
    ("gemma4", '<|tool_call>call:f{text:<|"|>a "b"\n,}<|"|>,more:{n:[1,-2.5],<|"|>x y<|"|>:null},items:[],flag:true}'
     "<tool_call|>ok", "ok",
     [("f", {"text": 'a "b"\n,}', "more": {"n": [1, -2.5], "x y": None}, "items": [], "flag": True})]),
    ("gemma4", '<|tool_call>call:f{text:<|"|>a', "", [("f", '{"text": "a')]),
    ("gemma4", "<|tool_call>call:nope{}<tool_call|>", None, []),
    ("functionary", '<function=g>{"a": 1}</function>', "", [("g", {"a": 1})]),
    ("nemotron_json", f"<TOOLCALL>[{F}]</TOOLCALL>", "", [F_CALL]),
    ("gigachat3", f"hm<|message_sep|>\n\nfunction call<|role_sep|>\n{F}", "hm<|message_sep|>", [F_CALL]),
    ("mistral", f"[TOOL_CALLS][{F}]", "", [F_CALL]),
    ("mistral", '[TOOL_CALLS]g[ARGS]{"a": 1}[TOOL_CALLS]f{}', "", [("g", {"a": 1}), ("f", {})]),
    ("mistral", "x[TOOL_CALLS]h{}", "x[TOOL_CALLS]h{}", []),
    (
        "deepseek_v3",
        "x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"count": 1}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "x",
        [("f", {"count": 1}), G_CALL],
    ),
    (
        "deepseek_v31",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"count": 1}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>no<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>no<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        [("f", {"count": 1})],
    ),
    (
        "deepseek_v32",
        '\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="count" string="false">5'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="text" string="true">5</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "",
        [("f", {"count": 5, "text": "5"})],
    ),
    (
        "qwen3_coder",
        'hi\n<tool_call>\n<function=f>\n<parameter=count>\n5\n</parameter>\n<parameter=text>\nx "y"\n\nz\n'
        "</parameter>\n"
        '<parameter=more>\n{"k": [1]}\n</parameter>\n<parameter=maybe>\nnull\n</parameter>\n<parameter=flag>\nTrue\n'
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
        "hi",
        [("f", {"count": 5, "text": 'x "y"\n\nz', "more": {"k": [1]}, "maybe": None, "flag": True}), G_CALL],
    ),
    ("qwen3_coder", "<function=g>\n<parameter=x>\n5\n</parameter></function>!", "!", [("g", {"x": "5"})]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=text>\nab\n", "", [("f", '{"text": "ab\\n')]),
    ("qwen3_coder", "<function=h></function> <function=", None, []),
    ("qwen3_xml", "<tool_call><function=get_time.zone-2></function></tool_call>", "", [("get_time.zone-2", {})]),
    ("seed_oss", "<seed:tool_call>\n<function=f>\n<parameter=choice>a</parameter>\n</function>\n</seed:tool_call>", "",
     [("f", {"choice": "a"})]),
    ("glm45", "<tool_call>f\n<arg_key>count</arg_key>\n<arg_value>5</arg_value>\n<arg_key>node</arg_key>\n<arg_value>"
     '{"next": {}}</arg_value>\n</tool_call>\n<tool_call>g</tool_call>', "",
     [("f", {"count": 5, "node": {"next": {}}}), G_CALL]),
    ("glm45", "<tool_call>get_time\n</tool_call> <tool_call>nope\n</tool_call>", "<tool_call>nope\n</tool_call>",
     [("get_time", {})]),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="f">\n<parameter name="ratio">1.5</parameter>\n</invoke>\n'
     '<invoke name="g">\n</invoke>\n</minimax:tool_call>', "", [("f", {"ratio": 1.5}), G_CALL]),
    ("pythonic", "[f(count=1, text=\"x, (y\"), g(l=[1, {'a': None}], t=(True, 2))]", "",
     [("f", {"count": 1, "text": "x, (y"}), ("g", {"l": [1, {"a": None}], "t": [True, 2]})]),
    ("pythonic", "see [f(x) for x in y], [1] and [g", None, []),
    ("pythonic", "[f(text='it\\'s \\d', flag=true)]", "", [("f", {"text": "it's \\d", "flag": True})]),
    ("llama4_pythonic", "<|python_start|>[g()]<|python_end|>", "", [G_CALL]),
    ("olmo3", "ok <function_calls>f(count=1)\ng()</function_calls>", "ok", [("f", {"count": 1}), G_CALL]),
    ("lfm2", '<|tool_call_start|>[f(text="x")]<|tool_call_end|>done', "done", [("f", {"text": "x"})]),
    ("openai", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
     '<|constrain|>json<|message|>{"count": 1}<|call|>', "I look.", [("f", {"count": 1})]),
    ("openai", ' to=functions.f<|channel|>commentary json<|message|>{"count":', "", [("f", '{"count":')]),
    ("openai", "<|channel|>final<|message|>yes<|return|>", "yes", []),
    ("openai", " to=me, < is text", None, []),
]  # fmt: skip
CALLS = [("hermes", *case) for case in HERMES] + OTHERS


@pytest.mark.parametrize(("name", "answer", "text", "calls"), CALLS)
def test_calls_do_not_depend_on_how_text_arrives(name, answer, text, calls):
    for pieces in cuts(answer):
        assert outline(read(parser_of(name), pieces)) == (answer if text is None else text, "", calls), pieces


THOUGHTS = [
    ("qwen3", "", "<think>\nhm\n</think>\n\nyes\n", "yes\n", "hm", []),
    ("qwen3", "", "no < thoughts", "no < thoughts", "", []),
    ("qwen3", "", "a <think> b", "a <think> b", "", []),
    ("qwen3", "", "<think>cut </thi", "", "cut </thi", []),
    ("qwen3", "<assistant><think>\n", "hm</think>yes", "yes", "hm", []),
    ("qwen3", "<think>\n\n</think>\n\n", "yes", "yes", "", []),
    ("deepseek_r1", "", "hm</think>yes", "yes", "hm", []),
    ("deepseek_r1", "", "<think>hm</think>yes", "yes", "hm", []),
    ("deepseek_r1", "<think></think>", "yes", "yes", "", []),
    ("mistral", "", "[THINK]hm[/THINK]yes", "yes", "hm", []),
    ("granite", "", "Here is my thought process: hm. Here is my response: yes", "yes", "hm.", []),
    ("gemma4", "", "<|channel>thought\nhm\n<channel|>yes", "yes", "hm", []),
    ("seed_oss", "", "<seed:think>hm</seed:think>yes", "yes", "hm", []),
    ("qwen3", "", f"<think>a\n<tool_call>{F}</tool_call>\nb</think>c", "c", "a\nb", [F_CALL]),
    ("qwen3", "<think>", f"<tool_call>{F}</tool_call>", "", "", [F_CALL]),
    ("qwen3", "", '<think>a<tool_call>{"name": "g", "arguments": {"a": "</think>"}}</tool_call></think>b', "b", "a",
     [("g", {"a": "</think>"})]),
    ("qwen3", "", f"<think>a</think><tool_call>{F}</tool_call><think>b</think>c", "c", "ab", [F_CALL]),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
     "yes", "hm", []),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.g<|channel|>commentary"
     "<|message|><|call|>", "", "a", [G_CALL]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "prompt", "answer", "text", "thoughts", "calls"), THOUGHTS)
def test_thoughts_do_not_depend_on_how_text_arrives(name, prompt, answer, text, thoughts, calls):
    for pieces in cuts(answer):
        assert outline(read(parser_of("hermes", name, prompt), pieces)) == (text, thoughts, calls), pieces


def test_arguments_come_while_the_call_is_written():
    parser = parser_of("hermes")
    assert parser.feed('<tool_call>{"name": "g", "argum') == []
    start, begun = parser.feed('ents": {"a": "on')
    assert isinstance(start, CallStart) and start.name == "g" and begun == CallArguments('{"a": "on')
    assert parser.feed("e two") == [CallArguments("e two")]
    assert parser.feed('"}}</tool') == [CallArguments('"}'), CallEnd()]


@pytest.mark.parametrize("name", ["qwen3_coder", "minimax_m2", "glm45"])
def test_a_long_text_between_tags_streams(name):
    tags = {
        "qwen3_coder": "<function=f>\n<parameter=text>\n",
        "minimax_m2": '<invoke name="f"><parameter name="text">',
        "glm45": "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>",
    }
    parser = parser_of(name)
    parser.feed(tags[name])
    assert joined(parser.feed('so "on')) == [CallArguments('so \\"on')]


def test_text_is_held_back_only_while_it_may_be_a_marker():
    parser = parser_of("hermes", "qwen3")
    assert parser.feed("a <tool") == [Text("a")]
    assert parser.feed("s") == [Text(" <tools")]
    assert parser.feed('<tool_call>{"id') == [] and parser.feed('iom": 1') == [Text('<tool_call>{"idiom": 1')]


def test_a_call_that_ends_with_the_text_is_said_to_be_incomplete():
    parser = parser_of("hermes")
    events = parser.feed('<tool_call>{"name": "g", "arguments": {"a": ') + parser.finish()
    assert events[-1] == CallEnd(complete=False)


def test_ids_are_those_of_the_model_where_it_writes_any():
    kimi = "<|tool_call_begin|>functions.g:3<|tool_call_argument_begin|>{}<|tool_call_end|>"
    (call,) = read(parser_of("kimi_k2"), [f"<|tool_calls_section_begin|>{kimi}<|tool_calls_section_end|>"]).calls
    assert (call.name, call.id, call.arguments) == ("g", "functions.g:3", "{}")
    (call,) = read(parser_of("mistral"), ["[TOOL_CALLS]g[CALL_ID]abc12DEF3[ARGS]{}"]).calls
    assert call.id == "abc12DEF3"
    (call,) = read(parser_of("mistral"), ["[TOOL_CALLS]g[ARGS]{}"]).calls
    assert len(call.id) == 9 and call.id.isalnum()


def test_without_tools_a_call_is_text():
    parser = AnswerFormat.chosen(None, "hermes").parser({})
    assert read(parser, [f"<tool_call>{F}</tool_call>"]).text == f"<tool_call>{F}</tool_call>"


def test_parts_are_in_their_order():
    answer = read(parser_of("hermes", "qwen3"), [f"<think>a</think>b<tool_call>{F}</tool_call>c"])
    assert [type(part).__name__ for part in answer.parts] == ["Reasoning", "Text", "ParsedCall", "Text"]


@pytest.mark.parametrize("garbage", ["{" * 3000, "[" * 3000, '{"a":' * 500, "<tool_call>" * 300, "<think>" * 300])
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "pythonic", "qwen3_coder", "glm45", "openai", "mistral"])
def test_no_answer_is_too_strange(name, garbage):
    answer = read(parser_of(name), list(garbage))
    assert answer.text == garbage and not answer.calls


@pytest.mark.parametrize(
    ("template", "calls", "thinking"),
    [
        ("... <tool_call> ...", "hermes", "none"),
        ("... ipython ...", "llama3_json", "none"),
        ("<tool_call> <function= </think>", "qwen3_coder", "qwen3"),
        ("<arg_key> <tool_call> </think>", "glm45", "glm45"),
        ("[TOOL_CALLS] [THINK]", "mistral", "mistral"),
        ("<|channel|>analysis", "openai", "openai_gptoss"),
    ],
)
def test_formats_follow_the_template(template, calls, thinking):
    assert AnswerFormat.chosen(template) == AnswerFormat.chosen(template, calls, thinking)


@pytest.mark.parametrize("template", [None, "a template that knows no tools"])
def test_without_a_sign_calls_are_read_as_most_models_write_them_and_forced_ones_are_plain(template):
    chosen = AnswerFormat.chosen(template)
    assert chosen.calls is CALL_FORMATS["hermes"] and chosen.written is None


def test_unknown_names_are_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"--tool-call-parser is 'herms'; expected one of auto, none, .*hermes, .*mistral"
    ):
        AnswerFormat.chosen(None, "herms")
    with pytest.raises(ValueError, match=r"--reasoning-parser is 'r1'; expected one of auto, none, .*deepseek_r1"):
        AnswerFormat.chosen(None, "auto", "r1")


@pytest.mark.parametrize("name", sorted(CALL_FORMATS))
def test_markers_of_calls_are_kept_in_the_text(name):
    chosen = AnswerFormat.chosen(None, name, "none")
    assert {m for m in chosen.calls.opens if len(m) > 1} <= set(chosen.kept_special_tokens(TOOLS))
    assert not chosen.kept_special_tokens({})


@pytest.mark.parametrize("name", sorted(THINKING))
def test_plain_text_is_text_for_every_reasoning_parser(name):
    answer = collect((parser := parser_of("none", name, "</think>")).feed("plain") + parser.finish())
    assert answer.text + answer.reasoning == "plain"
