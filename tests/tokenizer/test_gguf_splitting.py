"""A GGUF file's `tokenizer.ggml.pre` cuts a text as the tokenizer it names, under every name that llama.cpp equates."""

from __future__ import annotations

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

from jaxllm.tokenizer.gguf import tokenizer_from_metadata
from jaxllm.tokenizer.gguf_splitting import SPLITTINGS
from jaxllm.tokenizer.token_bytes import byte_to_unicode

KANJI, KANA = "\u6f22\u5b57", "\u304b\u306a"
TEXT = f"it's 12345 tokens,  don't  IT'S\n\n  fooBar{KANJI}{KANA} e\u0301 a'lL $x+=1; \tend   "


def words(name: str, text: str = TEXT) -> list[str]:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITTINGS[name].patterns]
    return [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


def by_pattern(pattern: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(TEXT)]


def by_byte_level() -> list[str]:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str(TEXT)
    return [TEXT[start:stop] for _, (start, stop) in whole]


def test_rules_are_those_of_the_tokenizers_that_transformers_has() -> None:
    assert words("qwen2") == by_pattern(QWEN2)
    assert words("qwen35") == by_pattern(QWEN35)
    # ByteLevel gives the second half of a combining pair the offsets of the whole character.
    assert "".join(words("gpt-2")) == TEXT
    assert [w for w in words("gpt-2") if w.isascii()] == [w for w in by_byte_level() if w.isascii()]


EQUAL = {
    "llama-bpe": ["llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
    "qwen2": ["deepseek-r1-qwen", "kormo", "megrez"],
    "gpt-2": ["phi-2", "mpt", "olmo", "jais", "gigachat", "exaone4"],
    "smollm": ["starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
    "gpt-4o": ["llama4", "kanana2"],
    "glm4": ["chatglm-bpe", "dbrx", "smaug-bpe"],
    "deepseek-v3": ["hunyuan-dense"],
}


@pytest.mark.parametrize(("name", "equal"), [(name, equal) for name, names in EQUAL.items() for equal in names])
def test_names_that_llama_cpp_equates_are_one_rule(name: str, equal: str) -> None:
    assert SPLITTINGS[equal] == SPLITTINGS[name]


CUT = {
    "llama-bpe": ["12345>123 45", "'S>'S", "\n\n  f>\n\n| | f"],
    "smollm": ["12345>1 2 3 4 5", "'S>' S"],
    "default": ["12345>123 45"],
    "falcon": ["12345>123 45", "don't>don ' t"],
    "deepseek-llm": ["12345>12345", f"fooBar{KANJI}>fooBar {KANJI}"],
    "deepseek-coder": ["12345>1 2 3 4 5", f"fooBar{KANJI}>fooBar {KANJI}"],
    "deepseek-v3": ["12345>123 45", f"r{KANJI}{KANA}>r {KANJI}{KANA}"],
    "kimi-k2": [f"r{KANJI}{KANA}>r {KANJI} {KANA}", "fooBar>foo Bar", "don't>don't"],
    "gpt-4o": ["fooBar>foo Bar", "don't>don't", "12345>123 45"],
    "tekken": ["fooBar>foo Bar", "don't>don 't", "12345>1 2 3 4 5"],
    "tiny_aya": ["12345>12 345"],
    "superbpe": ["1234567>1 234 567"],
}


@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name, cuts in CUT.items() for cut in cuts])
def test_what_tells_the_rules_apart(name: str, cut: str) -> None:
    text, _, expected = cut.partition(">")
    assert words(name, text) == expected.split("|" if "|" in expected else " ")


@pytest.mark.parametrize("name", SPLITTINGS)
def test_every_rule_is_valid_and_loses_nothing(name: str) -> None:
    alphabet = list(byte_to_unicode().values())
    metadata = {"model": "gpt2", "pre": name, "tokens": alphabet, "merges": [], "add_bos_token": False}
    tokenizer = tokenizer_from_metadata({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    text = TEXT.replace("e\u0301", "\u00e9")  # composed, as some rules do first
    assert tokenizer.decode(tokenizer.encode(text)) == text
