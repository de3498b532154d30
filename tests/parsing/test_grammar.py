"""Calls that must be made are written in the model's own format, behind its thoughts where the prompt begins one."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.config.sampling import StructuredOutputs
from jaxllm.constraints.grammars import GrammarCompiler
from jaxllm.parsing.registry import AnswerFormat
from jaxllm.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.byte_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer
from tests.parsing.reading import outline, read
from tests.parsing.test_round_trip import WRITTEN, written

FUNCTIONS = {
    "f": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"$ref": "#/$defs/Count"},
            "flag": {"type": "boolean"},
            "choice": {"enum": ["a", "b"]},
            "items": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["text"],
        "$defs": {"Count": {"type": "integer"}},
    },
    "g": {"type": "object", "properties": {}},
}
SIGNS = {"deepseek_v3": "```json", "granite": "<|tool_call|>", "mistral": "[ARGS]"}
JSON = StructuredOutputs(json={"type": "object"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB_SIZE, (EOS_ID,))


def accepted(compiler: GrammarCompiler, form: StructuredOutputs | None, ids: list[int]) -> int:
    """How many of the tokens the form allows."""
    assert form is not None
    constraint, words = compiler.compile(form), np.zeros(VOCAB_SIZE // 32 + 1, np.int32)
    for n, token in enumerate(ids):
        constraint.fill_mask(words)
        if not (words[token // 32] >> (token % 32)) & 1:
            return n
        constraint.accept(token)
    return len(ids)


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_forced_call_is_what_the_model_would_write(compiler, tokenizer, name):
    form = AnswerFormat.chosen(SIGNS.get(name), name, "none").constrained(JSON, "", {}, FUNCTIONS)
    call = {"text": 'x "y"\nz', "count": 5, "flag": True, "choice": "a", "items": ["b"]}
    for arguments in (call, {"text": ""}):
        answer = written(name, [arguments]).strip("\n;").removeprefix("<|start|>assistant")
        ids = tokenizer.encode(answer, add_special_tokens=False)
        assert accepted(compiler, form, ids) == len(ids), answer
        parser = AnswerFormat.chosen(None, name, "none").parser(FUNCTIONS, forced=True)
        assert outline(read(parser, [answer])) == ("", "", [("f", arguments)])
    wrong = tokenizer.encode(written(name, [{"count": "five"}]).removeprefix("<|start|>assistant"))
    assert accepted(compiler, form, wrong) < len(wrong)


@pytest.mark.parametrize(
    ("name", "call", "between"),
    [
        ("hermes", '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "\n"),
        ("llama3_json", '{"name": "g", "parameters": {}}', "; "),
    ],
)
def test_calls_of_several_functions_follow_each_other(compiler, tokenizer, name, call, between):
    chosen = AnswerFormat.chosen(None, name, "none")
    ids = tokenizer.encode(between.join([call, call]), add_special_tokens=False)
    several = chosen.constrained(JSON, "", {}, FUNCTIONS, several=True)
    assert accepted(compiler, several, ids) == len(ids)
    assert accepted(compiler, chosen.constrained(JSON, "", {}, FUNCTIONS), ids) == len(call)
    answer = read(chosen.parser(FUNCTIONS, forced=True), [between.join([call, call])])
    assert outline(answer) == ("", "", [("g", {}), ("g", {})])


def test_special_tokens_of_a_format_are_those_tokens(compiler, tokenizer):
    special = {"[TOOL_CALLS]": BOS_ID}
    form = AnswerFormat.chosen("[TOOL_CALLS] [ARGS]").constrained(JSON, "", special, FUNCTIONS)
    ids = [BOS_ID, *tokenizer.encode("g[ARGS]{}", add_special_tokens=False)]
    assert accepted(compiler, form, ids) == len(ids)
    assert accepted(compiler, form, tokenizer.encode("[TOOL_CALLS]")) == 0


def test_json_comes_behind_the_thought_that_the_prompt_begins(compiler, tokenizer):
    chosen = AnswerFormat.chosen("</think>")
    form = chosen.constrained(StructuredOutputs(json={"type": "integer"}), "<think>\n", {})
    ids = tokenizer.encode('so "on" {\n</think>\n\n12', add_special_tokens=False)
    assert accepted(compiler, form, ids) == len(ids)
    form = chosen.constrained(StructuredOutputs(json_object=True), "<think>\n", {"</think>": BOS_ID})
    ids = [*tokenizer.encode("so </think>", add_special_tokens=False), BOS_ID, ord("{"), ord("}")]
    assert accepted(compiler, form, ids) == len(ids)
    assert outline(read(chosen.parser({}, "<think>\n"), ["so</think>\n\n12"])) == ("12", "so", [])


@pytest.mark.parametrize("form", [None, JSON, StructuredOutputs(regex="a+")])
def test_other_forms_stay_as_they_are(form):
    assert AnswerFormat.chosen("</think>").constrained(form, "no thought", {}) is form
    assert AnswerFormat.chosen("no format").constrained(form, "", {}, FUNCTIONS) is form


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("hermes", {"type": "array", "uniqueItems": True}),
        ("qwen3_coder", {"type": "string", "maxLength": 3}),
        ("qwen3_coder", {"anyOf": [{"enum": ["a"]}, {"type": "null"}]}),
    ],
)
def test_what_a_grammar_does_not_enforce_is_left_to_the_plain_form(name, parameter):
    functions = {"f": {"type": "object", "properties": {"a": parameter}}}
    assert AnswerFormat.chosen(None, name).constrained(JSON, "", {}, functions) is JSON
    functions["f"]["properties"]["a"] = {"anyOf": [{"type": "string", "title": "A"}, {"type": "null"}]}
    assert AnswerFormat.chosen(None, name).constrained(JSON, "", {}, functions) is not JSON


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "openai"])
def test_a_forced_call_may_be_plain_json(name):
    thinking, thought = ("openai_gptoss", "") if name == "openai" else ("qwen3", "a</think>")
    parser = AnswerFormat.chosen(None, name, thinking).parser(FUNCTIONS, "<think>", forced=True)
    answer = '[{"name": "f", "arguments": {"text": "</think>"}}, {"name": "g", "arguments": {}}]'
    calls = [("f", {"text": "</think>"}), ("g", {})]
    assert outline(read(parser, [thought + answer])) == ("", thought[:1], calls)
