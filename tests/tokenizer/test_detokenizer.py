"""Streaming text equals decoding everything at once, for byte-level and SentencePiece vocabularies."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.tokenizer import Tokenizer, load_tokenizer
from jaxllm.tokenizer.gguf import tokenizer_from_metadata
from tests.helpers.byte_tokenizer import EOS_ID, VOCAB_SIZE, write_byte_tokenizer

EMOJI = "a😀é👩‍👩‍👧 \ufffd"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes")))


def sentencepiece_metadata(**changes: object) -> dict[str, object]:
    """A vocabulary where 'hello' needs several joins and everything rare needs bytes."""
    pieces = [
        "▁h",
        "el",
        "▁hel",
        "lo",
        "▁hello",
        "▁w",
        "or",
        "▁wor",
        "ld",
        "▁world",
        "▁",
        "",
        *"helowrd\ufffd",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [-float(n) for n in range(len(pieces))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    arrays = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    return {f"tokenizer.ggml.{k}": v for k, v in (arrays | ids | changes).items()}


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return tokenizer_from_metadata(sentencepiece_metadata())


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> tuple[list[str], str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    pushed = [detokenizer.push(ids[a:b]) for a, b in itertools.pairwise(bounds)]
    return pushed, detokenizer.finish()


CUTS = st.lists(st.integers(0, 60), max_size=60)
BYTE_IDS = st.lists(
    st.integers(0, VOCAB_SIZE + 3) | st.sampled_from(list(EMOJI.encode())) | st.just(EOS_ID), max_size=60
)
SENTENCEPIECE_IDS = st.lists(
    st.integers(0, 280) | st.sampled_from([3 + b for b in EMOJI.encode()]) | st.integers(259, 277),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(ids=BYTE_IDS, cuts=CUTS, skip=st.booleans())
def test_byte_level_stream_concatenates_to_decode(byte_level, ids, cuts, skip):
    pushed, rest = stream(byte_level, ids, cuts, skip)
    assert "".join(pushed) + rest == byte_level.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(ids=SENTENCEPIECE_IDS, cuts=CUTS, skip=st.booleans())
def test_sentencepiece_stream_concatenates_to_decode(sentencepiece, ids, cuts, skip):
    pushed, rest = stream(sentencepiece, ids, cuts, skip)
    assert "".join(pushed) + rest == sentencepiece.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé日😀👩‍ "), max_size=20))
def test_valid_text_streamed_byte_by_byte_never_shows_a_replacement_character(byte_level, text):
    detokenizer = byte_level.detokenizer()
    pushed = [detokenizer.push([b]) for b in text.encode()]
    assert not any("\ufffd" in piece for piece in pushed)
    assert "".join(pushed) == text  # nothing is left for finish()
    assert detokenizer.finish() == ""


def test_each_character_is_released_with_its_last_byte(byte_level):
    detokenizer = byte_level.detokenizer()
    assert [detokenizer.push([b]) for b in "é😀".encode()] == ["", "é", "", "", "", "😀"]


def test_half_a_character_is_held_back_until_finish_gives_what_decode_gives(byte_level):
    detokenizer = byte_level.detokenizer()
    assert detokenizer.push(list("😀".encode()[:3])) == ""
    assert detokenizer.finish() == "\ufffd" == byte_level.decode(list("😀".encode()[:3]))


def test_finish_leaves_an_empty_stream(byte_level, sentencepiece):
    for tokenizer, half in ((byte_level, [0xF0]), (sentencepiece, [3 + 0xF0])):
        detokenizer = tokenizer.detokenizer()
        detokenizer.push(half)
        assert detokenizer.finish() == "\ufffd"
        assert detokenizer.finish() == ""


def test_endless_invalid_bytes_are_not_held_without_bound(byte_level):
    detokenizer = byte_level.detokenizer()
    assert len("".join(detokenizer.push([0xFF]) for _ in range(1000))) == 1000


def test_special_tokens_are_shown_only_when_asked_for(byte_level):
    ids = [104, EOS_ID, 105]
    assert byte_level.detokenizer().push(ids) == "hi"
    assert byte_level.detokenizer(skip_special_tokens=False).push(ids) == "h<|eos|>i"


def test_first_space_is_dropped_once_and_later_ones_are_kept(sentencepiece):
    ids = sentencepiece.encode("hello hello world", add_special_tokens=False)
    detokenizer = sentencepiece.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == ["hello", " hello", " world"]


def test_tokens_without_text_do_not_restart_the_sequence(sentencepiece):
    hello, empty = (sentencepiece.backend.token_to_id(token) for token in ("▁hello", ""))
    detokenizer = sentencepiece.detokenizer()
    assert [detokenizer.push([i]) for i in (hello, empty, hello)] == ["hello", "", " hello"]


def test_text_waits_for_the_end_of_a_run_of_byte_tokens(sentencepiece):
    # The library turns a run with one bad byte into replacement characters throughout, valid bytes included.
    run = [3 + b for b in b"ab\xff"]
    detokenizer = sentencepiece.detokenizer()
    assert [detokenizer.push([i]) for i in run] == ["", "", ""]
    assert detokenizer.finish() == sentencepiece.decode(run)


def test_real_vocabulary_streams_to_decode(smollm2_path: Path):
    tokenizer = load_tokenizer(smollm2_path)
    ids = tokenizer.encode("Hé 😀👩‍👩‍👧‍👦 日本語\n\tdef f(x): return 42<|im_end|>")
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == tokenizer.decode(ids)


def test_a_special_token_that_is_kept_stays_in_the_text(byte_level):
    stream = byte_level.detokenizer(kept=["<|eos|>", "<|unknown|>"])
    assert stream.push([ord("a"), 256, EOS_ID, ord("b")]) + stream.finish() == "a<|eos|>b"
