"""Files become examples, documents and batches; what is wrong with them is said with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.tokenizer import ChatOptions, load_tokenizer
from jaxllm.training.config import TrainConfig
from jaxllm.training.data.batches import Packed, Stream, locate
from jaxllm.training.data.documents import Document, instruction_document
from jaxllm.training.data.files import Example, find_files, read_examples
from jaxllm.training.material import load_material
from jaxllm.training.origin import TEMPLATES
from jaxllm.training.vocabulary import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer("byte", [])
    made.chat.configure(ChatOptions(template=TEMPLATES["chatml"]))
    return made


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("name", "content", "task", "message"),
    [
        ("a.txt", "", "pretrain", r"a\.txt: the file is empty"),
        ("a.txt", b"one\ntw\xff\n", "pretrain", r"a\.txt:2: not UTF-8"),
        ("a.txt", "too short", "pretrain", r"a\.txt: has 8 tokens to train on, fewer than one span"),
        ("a.jsonl", "", "sft", r"a\.jsonl: the file is empty"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": oops}\n', "pretrain", r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"text": "x"}\n{"words": 1}\n', "pretrain", r"a\.jsonl:2: has words; expected messages"),
        ("a.jsonl", '{"text": "x"}\n7\n', "pretrain", r"a\.jsonl:2: expected an object"),
        ("a.jsonl", '{"prompt": "x"}\n', "sft", r"a\.jsonl:1: completion is missing"),
        ("a.jsonl", json.dumps({"messages": [TURN]}), "sft", r"a\.jsonl:1: no message is the assistant's"),
        ("a.jsonl", json.dumps({"messages": "x"}), "sft", r"a\.jsonl:1: messages must be a list"),
        ("a.json", '[\n{"text": "x"},\n]', "sft", r"a\.json:3: not JSON"),
        ("a.json", "{}", "sft", r"a\.json:1: expected a JSON list"),
        ("a.json", '[{"instruction": "x", "output": ""}]', "sft", r"a\.json: entry 1: output is empty"),
        ("a.tsv", "ham\thi\nspam\n", "classify", r"a\.tsv:2: expected a label, one tab and a text"),
        ("a.tsv", "ham\thi\nham\tho\n", "classify", r"a\.tsv:1: classification needs at least two labels"),
        ("a.jsonl", '{"text": "x"}\n', "classify", r"a\.jsonl:1: classification needs at least two labels"),
    ],
)
def test_bad_data_is_one_line_with_file_and_line(tmp_path, tokenizer, name, content, task, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = TrainConfig(task=task, data=str(file), output="-", context_length=32)
    with pytest.raises(ValueError, match=message) as caught:
        load_material(config, find_files(str(file), None), tokenizer, 64, tmp_path / "work")
    assert "\n" not in str(caught.value)


def test_a_label_that_training_never_saw_is_refused(tmp_path, tokenizer):
    train, valid = tmp_path / "train.tsv", tmp_path / "valid.tsv"
    train.write_text("ham\thi\nspam\twin\n"), valid.write_text("ham\thi\neggs\tho\n")
    config = TrainConfig(task="classify", data=str(train), eval_data=str(valid), output="-")
    with pytest.raises(ValueError, match=r"valid\.tsv:2: label 'eggs' is not among ham, spam"):
        load_material(config, find_files(str(train), str(valid)), tokenizer, 64, tmp_path)


def test_a_document_longer_than_the_context_is_refused(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n' + json.dumps({"prompt": "x" * 40, "completion": "y"}))
    config = TrainConfig(task="sft", data=str(file), output="-", context_length=32)
    with pytest.raises(ValueError, match=r"a\.jsonl:2: has 41 tokens, more than context_length=32"):
        load_material(config, find_files(str(file), str(file)), tokenizer, 64, tmp_path)


def test_only_what_the_assistant_says_counts(tokenizer):
    talk = [TURN, {"role": "assistant", "content": "yes"}, TURN, {"role": "assistant", "content": "no"}]
    document = instruction_document(Example(place="a:1", messages=talk), tokenizer)
    counted = [document.targets[i] for i in np.flatnonzero(document.weights)]
    assert tokenizer.decode(counted, skip_special_tokens=False) == "yes<|im_end|>no<|im_end|>"
    assert tokenizer.decode(document.prompt, skip_special_tokens=False).endswith("<|im_start|>assistant\n")


def test_a_stream_is_read_once_in_each_pass_and_every_target_is_the_next_token():
    tokens = np.arange(1000)
    stream = Stream(tokens, np.array([]), spans=3, span=16, seed=5)
    seen = []
    for index in range(stream.num_batches(0)):
        batch = stream.batch(0, index)
        assert np.array_equal(batch.targets, batch.tokens + 1) and batch.documents is None
        seen += batch.tokens.tolist()
    assert len(seen) == len(set(seen)) >= 1000 - 4 * 16
    assert not np.array_equal(stream.batch(0, 0).tokens, stream.batch(1, 0).tokens)
    again = Stream(tokens, np.array([]), spans=3, span=16, seed=5)
    assert np.array_equal(again.batch(1, 2).tokens, stream.batch(1, 2).tokens)
    assert locate(stream, stream.num_batches(0) + 2) == (1, 2)


def test_no_token_of_a_stream_predicts_another_document():
    ends = np.array([5, 21, 64])
    stream = Stream(np.arange(64), ends, spans=2, span=16, seed=0)
    for index in range(stream.num_batches(0)):
        batch = stream.batch(0, index)
        for token, target, weight, position in zip(
            batch.tokens, batch.targets, batch.weights, batch.positions, strict=True
        ):
            assert weight == (target not in ends) and target == token + 1
            assert position <= token - max([0, *ends[ends <= token]])


def test_packing_uses_every_document_once_and_cuts_none():
    rng = np.random.default_rng(0)
    documents = [
        Document(str(i), np.full(n, i, np.int32), np.full(n, i, np.int32), np.ones(n, np.float32))
        for i, n in enumerate(rng.integers(1, 33, 100))
    ]
    packed = Packed(documents, spans=4, span=32, seed=0)
    for epoch in (0, 1):
        tokens, places = [], 0
        for index in range(packed.num_batches(epoch)):
            batch = packed.batch(epoch, index)
            real = batch.documents >= 0
            assert np.array_equal(real, batch.weights > 0)
            tokens += batch.tokens[real].tolist()
            places += batch.tokens.size
        assert np.array_equal(np.bincount(tokens), [len(d.tokens) for d in documents])
        assert len(tokens) / places > 0.85
    assert not np.array_equal(packed.batch(0, 0).tokens, packed.batch(1, 0).tokens)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:400"])
def test_tokenizers_made_here_give_every_text_back_and_load_again(kind, tmp_path):
    from jaxllm.tokenizer.save_folder import save_tokenizer

    words = "Hello, wörld  \n two\tspaces 世界 " * 30
    made = make_tokenizer(kind, [words])
    assert made.decode(made.encode(words)) == words
    save_tokenizer(made, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(words) == made.encode(words) and again.eos_token_ids == made.eos_token_ids
    if kind != "char":
        assert made.decode(made.encode("неизвестно")) == "неизвестно"


def test_forms_are_recognised_by_their_keys(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [
        {"text": "a", "label": 1},
        {"prompt": "p", "completion": "c"},
        {"instruction": "i", "output": "o"},
        [TURN, {"role": "assistant", "content": "x"}],
    ]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, second, third, fourth = read_examples(file)
    assert (first.text, first.label, second.completion) == ("a", "1", "c")
    assert third.messages and [turn["content"] for turn in third.messages] == ["i", "o"]
    assert fourth.messages and fourth.place == f"{file}:4"


def test_a_toml_file_says_what_flags_say(tmp_path):
    from jaxllm.training.config import read_toml

    file = tmp_path / "run.toml"
    file.write_text('data = "x"\nlearning-rate = 0.5\nbatch_size = 3\n')
    assert read_toml(Path(file)) == {"data": "x", "learning_rate": 0.5, "batch_size": 3}
    file.write_text("batchsize = 3\n")
    with pytest.raises(ValueError, match=r"run\.toml has an unknown field 'batchsize'"):
        read_toml(Path(file))
