"""Which template a conversation goes through, and with which variables."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from jaxllm.tokenizer import ChatOptions, Tokenizer, load_tokenizer
from jaxllm.tokenizer.gguf import tokenizer_from_metadata
from tests.helpers.byte_tokenizer import BOS_ID, write_byte_tokenizer
from tests.tokenizer.test_gguf_tokenizer import byte_level_metadata

QUESTION = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "model")


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def with_templates(folder: Path, templates: Any) -> Path:
    write(folder, "tokenizer_config.json", {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": templates})
    return folder


def both(tokenizer: Tokenizer) -> tuple[str, str]:
    return tokenizer.apply_chat_template(QUESTION), tokenizer.apply_chat_template(QUESTION, tools=TOOLS)


NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


def test_template_for_tools_is_taken_when_tools_are_given(folder: Path):
    assert both(load_tokenizer(with_templates(folder, NAMED))) == ("plain", "tools")
    assert both(load_tokenizer(with_templates(folder, {"default": "plain", "tool_use": "tools"}))) == ("plain", "tools")
    assert load_tokenizer(folder).apply_chat_template(QUESTION, tools=[]) == "plain"


def test_template_for_tools_may_lie_in_a_file_of_its_own(folder: Path):
    write(with_templates(folder, "plain"), "additional_chat_templates/tool_use.jinja", "tools")
    assert both(load_tokenizer(folder)) == ("plain", "tools")
    write(folder, "chat_template.jinja", "file")
    assert both(load_tokenizer(folder)) == ("file", "tools")


@pytest.mark.parametrize("place", ["list", "files", "jinja only", "processor"])
def test_choice_is_that_of_transformers(folder: Path, place: str):
    transformers = pytest.importorskip("transformers")
    with_templates(folder, NAMED if place in ("list", "jinja only") else None)
    if place in ("files", "jinja only"):
        write(folder, "chat_template.jinja", "file")
    if place == "files":
        write(folder, "additional_chat_templates/tool_use.jinja", "file for tools")
    if place == "processor":  # read by transformers' processors only; a model without another template needs it
        write(folder, "chat_template.json", {"chat_template": "file"})
        assert both(load_tokenizer(folder)) == ("file", "file")
        return
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    wanted = [reference.apply_chat_template(QUESTION, tools=tools, tokenize=False) for tools in (None, TOOLS)]
    assert list(both(load_tokenizer(folder))) == wanted


def test_template_for_tools_in_a_gguf_file():
    metadata = byte_level_metadata([])
    metadata |= {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    metadata |= {"tokenizer.chat_templates": ["tool_use"]}
    assert both(tokenizer_from_metadata(metadata)) == ("plain", "tools")


def test_no_default_among_several_names_them(folder: Path):
    templates = [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]
    tokenizer = load_tokenizer(with_templates(folder, templates))
    with pytest.raises(ValueError, match=r"templates for rag, tool_use, none of them the default; .*--chat-template"):
        tokenizer.apply_chat_template(QUESTION)
    assert load_tokenizer(folder, ChatOptions(template="rag")).apply_chat_template(QUESTION, tools=TOOLS) == "r"


def test_operators_template_replaces_all_of_the_models(folder: Path, tmp_path: Path):
    with_templates(folder, NAMED)
    write(tmp_path, "own.jinja", "{{ messages[0].content }}!")
    options = ChatOptions(template=str(tmp_path / "own.jinja"))
    assert both(load_tokenizer(folder, options)) == ("hi!", "hi!")
    assert both(load_tokenizer(folder, ChatOptions(template="{{ messages[0].role }}"))) == ("user", "user")


@pytest.mark.parametrize(
    ("template", "words"),
    [("missing.jinja", "No such file"), (".", "Is a directory"), ("{{ (", "does not compile")],
)
def test_operators_template_that_cannot_be_used_is_refused_when_it_is_loaded(folder: Path, template: str, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(folder, ChatOptions(template=template))
    assert "\n" not in str(caught.value)


THINKS = "{{ 'thinks' if enable_thinking is not defined or enable_thinking else 'does not' }}{{ flavour }}"


def test_default_variables_hold_unless_a_request_gives_others(folder: Path):
    with_templates(folder, THINKS)
    tokenizer = load_tokenizer(folder, ChatOptions(variables={"enable_thinking": False, "flavour": "!"}))
    assert tokenizer.apply_chat_template(QUESTION) == "does not!"
    prompt = tokenizer.chat_prompt(QUESTION, chat_template_kwargs={"enable_thinking": True})
    assert prompt["prompt"] == "thinks!"


def test_variables_are_those_the_template_reads_and_the_well_known_ones(folder: Path):
    tokenizer = load_tokenizer(with_templates(folder, THINKS))
    assert tokenizer.apply_chat_template(QUESTION, flavour="?", documents=[]) == "thinks?"
    with pytest.raises(ValueError, match=r"variables flavor are not allowed; expected any of .*flavour"):
        tokenizer.apply_chat_template(QUESTION, flavor="?")
    with pytest.raises(ValueError, match="does not read flavor, of the default chat template variables"):
        load_tokenizer(folder, ChatOptions(variables={"flavor": "?"}))


@pytest.mark.parametrize("name", ["messages", "raise_exception", "namespace", "bos_token", "add_generation_prompt"])
def test_what_a_template_gets_from_the_server_cannot_be_replaced(folder: Path, name: str):
    with_templates(folder, "{{ " + name + " }}")
    with pytest.raises(ValueError, match=f"variables {name} are not allowed"):
        load_tokenizer(folder).chat_prompt(QUESTION, chat_template_kwargs={name: "x"})


def test_doubled_beginning_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS_ID], "tokens": ["<|bos|>"]}},
    }
    write(folder, "tokenizer.json", content)
    tokenizer = load_tokenizer(folder)
    with caplog.at_level(logging.WARNING):
        tokenizer.encode("hi")
        tokenizer.chat_prompt(QUESTION)
        assert caplog.records == []
        for _ in range(2):
            assert tokenizer.encode("<|bos|>hi")[:2] == [BOS_ID, BOS_ID]
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["a prompt begins with <|bos|>"]
