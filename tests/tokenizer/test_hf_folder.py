"""Reading the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.tokenizer import load_tokenizer
from tests.helpers.byte_tokenizer import BOS_ID, CHAT_TEMPLATE, EOS_ID, VOCAB_SIZE, write_byte_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_tokenizer(tmp_path / "model")


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | changes
    write(folder, "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})


def test_byte_tokenizer_round_trips_and_has_the_documented_ids(folder: Path):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("hi") == [104, 105]
    assert tokenizer.encode("<|eos|>é") == [EOS_ID, *"é".encode()]
    assert tokenizer.decode(tokenizer.encode("a 😀\n")) == "a 😀\n"
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (
        VOCAB_SIZE,
        BOS_ID,
        (EOS_ID,),
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.apply_chat_template(MESSAGES) == "<|bos|>user\nhi<|eos|>\nassistant\n"


def test_generation_config_lists_what_ends_an_answer(folder: Path):
    write(folder, "generation_config.json", {"eos_token_id": [10, EOS_ID, 11]})
    assert load_tokenizer(folder).eos_token_ids == (10, EOS_ID, 11)


def test_eos_of_the_tokenizer_ends_an_answer_too(folder: Path):
    write(folder, "generation_config.json", {"eos_token_id": 10})
    assert load_tokenizer(folder).eos_token_ids == (10, EOS_ID)


def test_model_config_names_ids_when_nothing_else_does(folder: Path):
    change_config(folder, bos_token=None, eos_token=None)
    write(folder, "config.json", {"text_config": {"bos_token_id": 7, "eos_token_id": [8, 9]}})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (7, (8, 9))


def test_end_of_turn_token_is_found_by_name_when_no_file_lists_it(folder: Path):
    content = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<|bos|>", "<|im_end|>")
    write(folder, "tokenizer.json", content)
    change_config(folder, bos_token=None)
    assert load_tokenizer(folder).eos_token_ids == (EOS_ID, BOS_ID)
    write(folder, "generation_config.json", {"eos_token_id": EOS_ID})
    assert load_tokenizer(folder).eos_token_ids == (EOS_ID,)


def test_special_tokens_may_be_written_as_objects_in_their_own_file(folder: Path):
    change_config(folder, bos_token=None, eos_token=None)
    write(folder, "special_tokens_map.json", {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS_ID, (EOS_ID,))


def test_template_file_wins_over_json_and_json_over_the_config(folder: Path):
    change_config(folder, chat_template="config")
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "config"
    write(folder, "chat_template.json", {"chat_template": "json"})
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "json"
    write(folder, "chat_template.jinja", "jinja")
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "jinja"


def test_default_is_taken_from_a_list_of_named_templates(folder: Path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    change_config(folder, chat_template=named)
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "plain"
    change_config(folder, chat_template=named[:1])
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "tools"


def test_model_without_a_template_says_to_use_generate(folder: Path):
    change_config(folder, chat_template=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="this model has no chat template; use generate"):
        tokenizer.apply_chat_template(MESSAGES)


def test_truncation_and_padding_saved_by_a_training_script_are_not_applied(folder: Path):
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|eos|>",
    }
    write(folder, "tokenizer.json", content)
    assert load_tokenizer(folder).encode("hello") == list(b"hello")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a readable tokenizer.json"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "holds a list; expected a JSON object"),
    ],
)
def test_damaged_files_are_refused_in_one_line(folder: Path, name: str, content: str, message: str):
    write(folder, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no tokenizer.json; write one with .*save_pretrained"):
        load_tokenizer(tmp_path)


def test_path_that_is_neither_folder_nor_gguf_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"expected a folder with tokenizer.json or a .gguf file"):
        load_tokenizer(tmp_path / "missing.gguf")


def test_ids_outside_the_vocabulary_give_no_text_and_negative_ids_are_refused(folder: Path):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([104, 5000, 105]) == "hi"
    assert tokenizer.token_text(5000) == tokenizer.token_text(-1) == ""
    with pytest.raises(ValueError, match="got token id -1"):
        tokenizer.decode([-1])


def test_token_text_shows_special_tokens_and_marks_half_characters(folder: Path):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_text(i) for i in (104, EOS_ID, 0xF0)] == ["h", "<|eos|>", "\ufffd"]
    assert tokenizer.token_bytes(0xF0) == b"\xf0"


def test_lone_surrogate_in_text_is_refused_by_name(folder: Path):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at 1"):
        load_tokenizer(folder).encode("a\ud83d")


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, jaxllm.tokenizer; "
        "print([m for m in ('jax', 'numpy', 'tokenizers', 'jinja2', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
