"""SentencePiece vocabularies from GGUF: joins by score, bytes for what is rare, spaces as marks.

The expected pieces follow from SentencePiece's algorithm by hand.
"""

from __future__ import annotations

from typing import Any

import pytest

from jaxllm.tokenizer import Tokenizer
from jaxllm.tokenizer.gguf import tokenizer_from_metadata

BYTES = [f"<0x{b:02X}>" for b in range(256)]
FIRST = 3 + 256  # <unk>, <s>, </s>, the bytes, then the pieces


def build(pieces: dict[str, float], user_defined: tuple[str, ...] = (), **changes: Any) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, *user_defined]
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), *[4] * len(user_defined)],
        "scores": [0.0] * FIRST + [*pieces.values()] + [-1000.0] * len(user_defined),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return tokenizer_from_metadata({f"tokenizer.ggml.{k}": v for k, v in (values | changes).items()})


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]


LETTERS = dict.fromkeys("▁abcdef", -100.0)


def test_the_joint_piece_with_the_best_score_wins_whatever_its_id():
    late = build(LETTERS | {"ab": -5.0, "bc": -1.0}, add_space_prefix=False)
    assert pieces_of(late, "abc") == ["a", "bc"]
    early = build(LETTERS | {"ab": -1.0, "bc": -5.0}, add_space_prefix=False)
    assert pieces_of(early, "abc") == ["ab", "c"]


def test_a_piece_is_reached_by_whichever_halves_are_in_the_vocabulary():
    tokenizer = build(LETTERS | {"ab": -1.0, "abc": -3.0, "cd": -2.0, "abcd": -4.0}, add_space_prefix=False)
    assert pieces_of(tokenizer, "abcd") == ["abcd"]


def test_text_starts_with_a_space_mark_unless_the_file_says_no():
    pieces = LETTERS | {"▁a": -1.0}
    assert pieces_of(build(pieces), "a a") == ["▁a", "▁a"]
    assert pieces_of(build(pieces, add_space_prefix=False), "a a") == ["a", "▁a"]


def test_the_added_space_disappears_again_when_decoding():
    for prefix in (True, False):
        tokenizer = build(LETTERS, add_space_prefix=prefix)
        for text in ("a b", " a", "a  b "):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_characters_outside_the_vocabulary_become_bytes():
    tokenizer = build(LETTERS, add_space_prefix=False)
    assert tokenizer.encode("é", add_special_tokens=False) == [3 + b for b in "é".encode()]
    assert tokenizer.decode(tokenizer.encode("é😀")) == "é😀"


def test_token_bytes_of_byte_tokens_are_the_bytes():
    tokenizer = build(LETTERS)
    assert tokenizer.token_bytes(3 + 0xF0) == b"\xf0"
    assert tokenizer.token_bytes(FIRST) == b" "


def test_user_defined_runs_of_spaces_are_taken_whole():
    tokenizer = build(LETTERS | {"▁a": -1.0}, user_defined=("  ", "   "), add_space_prefix=False)
    assert pieces_of(tokenizer, "b   a") == ["b", "   ", "a"]
    assert pieces_of(tokenizer, "b a") == ["b", "▁a"]


def test_bos_is_added_by_default():
    assert build(LETTERS).encode("a")[0] == 1
    assert build(LETTERS, add_bos_token=False).encode("a")[0] != 1


def test_missing_scores_are_refused():
    with pytest.raises(ValueError, match=r"scores has 0 entries; expected 266"):
        build(LETTERS, scores=None)


def test_files_that_name_no_special_tokens_have_those_of_llama():
    unnamed = dict.fromkeys(("bos_token_id", "eos_token_id", "unknown_token_id"))
    named, silent = build(LETTERS), build(LETTERS, **unnamed)
    assert silent.encode("ab") == named.encode("ab")
    assert (silent.bos_token_id, silent.eos_token_ids) == (named.bos_token_id, named.eos_token_ids) == (1, (2,))
    assert silent.special_tokens == named.special_tokens
