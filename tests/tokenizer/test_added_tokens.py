"""Added tokens that tokenizer.json lacks are tokens, with the ids that transformers gives them."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from jaxllm.tokenizer import load_tokenizer
from tests.helpers.byte_tokenizer import VOCAB_SIZE, write_byte_tokenizer
from tests.helpers.patience import slowness

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TEXTS = ["<think>a</think>", "a<tool>b", " <think> ", "<|im_start|>x", "é<pad>", "<|eos|>", "0123 <think"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "model")


def configure(folder: Path, **settings: Any) -> None:
    base = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | settings))


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": False, **FLAGS, **flags}


CASES: dict[str, dict[str, Any]] = {
    "ordinary": {"added_tokens_decoder": {"258": token("<think>"), "259": token("</think>")}},
    "special": {"added_tokens_decoder": {"258": token("<think>", special=True)}},
    "stripping": {"added_tokens_decoder": {"258": token("<think>", lstrip=True, rstrip=True)}},
    "named": {"added_tokens_decoder": {"258": token("<pad>")}, "pad_token": "<pad>"},
    "out of order": {"added_tokens_decoder": {"259": token("</think>"), "258": token("<think>")}},
    "known already": {"added_tokens_decoder": {"257": token("<|eos|>", special=True)}},
    "other properties": {"added_tokens_decoder": {"257": token("<|eos|>", special=False, lstrip=True)}},
    "part of the vocabulary": {"additional_special_tokens": ["0"]},
}


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(folder: Path, name: str):
    transformers = pytest.importorskip("transformers")
    configure(folder, **CASES[name])
    ours, reference = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == reference(text)["input_ids"], text
        ids = ours.encode(text)
        for skip in (False, True):
            wanted = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == wanted


def test_older_file_of_added_tokens_is_read(folder: Path):
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": 258, "</think>": 259}))
    assert load_tokenizer(folder).encode("<think>a</think>") == [258, 97, 259]


def test_ids_that_nobody_names_are_kept_free(folder: Path):
    configure(folder, added_tokens_decoder={"300": token("<think>"), "303": token("<tool>")})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<think>a<tool>") == [300, 97, 303]
    assert tokenizer.vocab_size == 304 > VOCAB_SIZE
    assert tokenizer.decode([270, 97]) == "a"


def test_many_tokens_are_added_quickly(folder: Path):
    configure(folder, added_tokens_decoder={str(i): token(f"<|{i}|>", special=True) for i in range(258, 3258)})
    start = time.process_time()
    assert load_tokenizer(folder).encode("<|3257|>") == [3257]
    assert time.process_time() - start < 5 * slowness()


def test_id_of_another_token_is_not_taken_and_that_is_said(folder: Path, caplog: pytest.LogCaptureFixture):
    configure(folder, added_tokens_decoder={"97": token("<think>")})
    with caplog.at_level(logging.WARNING):
        assert load_tokenizer(folder).encode("a") == [97]
    assert "'<think>' has the id 97 of another token" in caplog.text


@pytest.mark.parametrize(
    ("decoder", "words"),
    [({"99999999": token("<x>")}, "has id 99999999, but the vocabulary ends at 257"), ({"x": {}}, "that is no token")],
)
def test_entries_that_make_no_sense_are_refused_in_one_line(folder: Path, decoder: Any, words: str):
    configure(folder, added_tokens_decoder=decoder)
    with pytest.raises(ValueError, match=words):
        load_tokenizer(folder)
