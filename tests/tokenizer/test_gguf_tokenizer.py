"""Tokenizers built from GGUF metadata give the ids the model was trained with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from jaxllm.tokenizer import Tokenizer, load_tokenizer
from jaxllm.tokenizer.gguf import tokenizer_from_metadata
from jaxllm.tokenizer.token_bytes import byte_to_unicode

ALPHABET = list(byte_to_unicode().values())
SPACE = byte_to_unicode()[0x20]


def byte_level_metadata(joins: list[str], extra: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """256 byte tokens, one for each of `joins` (the merges), `extra` (ordinary), `<|im_end|>` (control)."""
    tokens = [*ALPHABET, *(m.replace(" ", "") for m in joins), *extra, "<|im_end|>"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 1) + [3],
        "merges": joins,
        "eos_token_id": len(tokens) - 1,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (values | changes).items() if v is not None}


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special_tokens=False)]


def tiny(pre: str, merges: list[str], **changes: Any) -> Tokenizer:
    return tokenizer_from_metadata(byte_level_metadata(merges, pre=pre, **changes))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


# Ids of the published tokenizer. transformers' GGUF reader ignores `tokenizer.ggml.pre` and so cuts spaces
# before digits differently ("  42" as " ", " ", "4", "2"); elsewhere both agree.
GOLDEN = {
    "Hello  42 world's": [19556, 256, 36, 34, 905, 506],
    "      1234567\n\n\tx": [5013, 33, 34, 35, 36, 37, 38, 39, 1116, 197, 104],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
    "😀 é ½²": [10813, 242, 218, 26411, 216, 16738, 19133],
    "  ٣٤": [256, 164, 113, 164, 114],
    "": [],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_smollm2_ids_are_those_of_the_published_tokenizer(smollm2: Tokenizer, text: str):
    assert smollm2.encode(text) == GOLDEN[text]
    assert smollm2.decode(GOLDEN[text], skip_special_tokens=False) == text


def test_smollm2_special_ids_come_from_the_file(smollm2: Tokenizer):
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2, 0)  # <|im_end|> is named by the file, <|endoftext|> by convention


def test_smollm2_prompt_follows_the_template_in_the_file(smollm2: Tokenizer):
    prompt = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_tokenizer_is_built_quickly(smollm2_path: Path):
    from jaxllm.checkpoints.gguf.file import read_header

    metadata = read_header(smollm2_path).metadata
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        tokenizer_from_metadata(metadata)
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 0.6


def test_merges_apply_within_words_only():
    tokenizer = tiny("gpt-2", ["a b", f"ab {SPACE}"])
    assert pieces(tokenizer, "ab ab") == ["ab", " ", "ab"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12", "34"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["12", "3", "4"]),
        ("qwen2", [*"1234"]),
    ],
)
def test_each_splitting_rule_cuts_digits_its_own_way(pre: str, expected: list[str]):
    assert pieces(tiny(pre, ["1 2", "3 4"]), "1234") == expected


def test_contractions_are_split_off_in_any_case_by_llama3_but_not_by_gpt2():
    merges = ["' L", "'L L"]
    assert pieces(tiny("llama-bpe", merges), "x'LL") == ["x", "'LL"]
    assert pieces(tiny("gpt-2", merges), "x'LL") == ["x", "'", "L", "L"]


def test_newlines_stay_with_punctuation_under_llama3_but_not_under_gpt2():
    newline = byte_to_unicode()[0x0A]
    merges = [f". {newline}"]
    assert pieces(tiny("llama-bpe", merges), ".\n") == [".\n"]
    assert pieces(tiny("gpt-2", merges), ".\n") == [".", "\n"]


def test_tekken_starts_a_new_word_at_a_capital():
    assert pieces(tiny("tekken", ["o B"], add_bos_token=False), "fooBar") == ["f", "o", "o", "B", "a", "r"]
    assert pieces(tiny("qwen2", ["o B"]), "fooBar") == ["f", "o", "oB", "a", "r"]


def test_a_whole_word_of_the_vocabulary_needs_no_merges_under_llama3():
    metadata = byte_level_metadata([], extra=("word",), pre="llama-bpe")
    assert pieces(tokenizer_from_metadata(metadata), "word") == ["word"]
    assert pieces(tokenizer_from_metadata(metadata | {"tokenizer.ggml.pre": "gpt-2"}), "word") == [*"word"]


def test_qwen2_composes_accents_first():
    assert tiny("qwen2", []).encode("e\u0301") == tiny("qwen2", []).encode("é")
    assert tiny("gpt-2", []).encode("e\u0301") != tiny("gpt-2", []).encode("é")


@pytest.mark.parametrize(
    ("pre", "flag", "added"),
    [("gpt-2", None, 0), ("gpt-2", True, 1), ("llama-bpe", None, 1), ("llama-bpe", False, 0)],
)
def test_bos_is_added_as_the_file_or_its_splitting_rule_says(pre: str, flag: bool | None, added: int):
    tokenizer = tiny(pre, [], bos_token_id=65, add_bos_token=flag)
    assert tokenizer.encode("x") == [65] * added + tokenizer.encode("x", add_special_tokens=False)


def test_eos_is_added_only_when_the_file_says_so():
    assert tiny("gpt-2", [], add_eos_token=True).encode("x")[-1] == 256
    assert tiny("gpt-2", []).encode("x")[-1] != 256


def test_control_tokens_are_skipped_and_user_defined_tokens_are_not():
    metadata = byte_level_metadata([], extra=("<tool>",))
    metadata["tokenizer.ggml.token_type"][256] = 4
    tokenizer = tokenizer_from_metadata(metadata)
    ids = tokenizer.encode("a<tool><|im_end|>")
    assert ids[1:] == [256, 257]
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<tool><|im_end|>"


def test_end_of_turn_tokens_are_found_by_name_only_when_they_are_control_tokens():
    metadata = byte_level_metadata([], extra=("<|eot_id|>",), eos_token_id=0)
    assert tokenizer_from_metadata(metadata).eos_token_ids == (0, 257)
    metadata["tokenizer.ggml.token_type"][256] = 3
    assert set(tokenizer_from_metadata(metadata).eos_token_ids) == {0, 256, 257}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "martian"}, r"pre='martian' is not supported; expected one of .*smollm.*qwen2"),
        ({"model": "bert"}, r"model='bert' is not supported.*gpt2, llama"),
        ({"model": None}, r"model=None is not supported"),
        ({"tokens": None}, r"tokens is missing"),
        ({"token_type": [1]}, r"token_type has 1 entries; expected 257"),
        ({"tokens": ["a"] * 257}, r"duplicates"),
        ({"merges": ["a b c"]}, r"merges has 'a b c'"),
        ({"merges": ["zz yy"]}, r"merges does not fit"),
        ({"eos_token_id": 9999}, r"eos_token_id=9999; expected an id below 257"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer_from_metadata(byte_level_metadata([], **changes))
    assert "\n" not in str(caught.value)


def test_missing_splitting_rule_is_reported(caplog: pytest.LogCaptureFixture):
    tokenizer_from_metadata(byte_level_metadata([], pre=None))
    assert "tokenizer.ggml.pre is missing" in caplog.text


def test_a_user_defined_end_of_turn_ends_an_answer():
    metadata = byte_level_metadata([], extra=("<end_of_turn>",), eos_token_id=0)
    metadata["tokenizer.ggml.token_type"][256] = 4
    assert 256 in tokenizer_from_metadata(metadata).eos_token_ids


def test_harmony_messages_end_with_end_but_answers_with_return_or_call():
    metadata = byte_level_metadata([], extra=("<|end|>", "<|return|>", "<|call|>"), eos_token_id=257)
    metadata["tokenizer.ggml.token_type"][256:259] = [3, 3, 3]
    assert set(tokenizer_from_metadata(metadata).eos_token_ids) == {257, 258, 259}  # 259 is <|im_end|>


def test_phi3_special_tokens_swallow_the_space_behind_them():
    metadata = byte_level_metadata([], extra=("<|user|>",))
    metadata["tokenizer.ggml.token_type"][256] = 3
    assert len(tokenizer_from_metadata(metadata).encode("<|user|>\n x")) == 4
    assert len(tokenizer_from_metadata(metadata | {"general.name": "Phi-3 Mini"}).encode("<|user|>\n x")) == 2


def test_an_empty_token_and_a_wrong_id_that_nothing_needs_are_put_up_with(caplog: pytest.LogCaptureFixture):
    tokenizer = tokenizer_from_metadata(byte_level_metadata([], extra=("",), padding_token_id=2**32 - 1))
    assert tokenizer.token_text(256) == "[EMPTY_256]"
    assert "padding_token_id" in caplog.text
