"""What `convert` makes of a GGUF file is a whole model again, here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from jaxllm.checkpoints import open_checkpoint
from jaxllm.families import read_config
from jaxllm.tokenizer import load_tokenizer
from jaxllm.weights.convert import convert
from tests.helpers.gguf_model import write_model
from tests.helpers.gguf_models import MODELS

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
TEXTS = ["it's  42 words,\n\n x", "<s>Hi</s> there", "\u00e9\u6f22 \U0001f600", " a", ""]


def with_text(writer: gguf.GGUFWriter) -> None:
    writer.add_chat_template(TEMPLATE)
    writer.add_add_bos_token(True)


def gguf_file(name: str, saved_model, path: Path) -> Path:
    more = MODELS[name].more

    def add(writer: gguf.GGUFWriter) -> None:
        if more is not None:
            more(writer)
        with_text(writer)

    return write_model(saved_model(name)[0], path, MODELS[name].arch, more=add)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(name: str, saved_model, tmp_path: Path) -> None:
    source = gguf_file(name, saved_model, tmp_path / "m.gguf")
    folder = convert(str(source), tmp_path / "hf", to="safetensors", dtype="float32")
    back = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert back.dtype == torch.float32
    prompt = torch.tensor([np.random.default_rng(0).integers(3, 96, 40).tolist()])
    with torch.no_grad():
        expected, got = saved_model(name)[1](prompt).logits, back(prompt).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    here = open_checkpoint(folder)
    assert read_config(here.config) == read_config(open_checkpoint(source).config)
    assert here.tensors.keys() == open_checkpoint(source).tensors.keys()


def test_text_is_the_same_in_the_file_in_the_folder_and_in_transformers(saved_model, tmp_path: Path) -> None:
    source = gguf_file("llama", saved_model, tmp_path / "m.gguf")
    folder = convert(str(source), tmp_path / "hf", to="safetensors")
    before, after = load_tokenizer(source), load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert before.encode(text) == after.encode(text) == theirs(text).input_ids
        assert before.decode(before.encode(text)) == after.decode(before.encode(text))
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert rendered == "<s>Hi</s>" == before.apply_chat_template(messages) == after.apply_chat_template(messages)
    assert (after.bos_token_id, after.eos_token_ids) == (before.bos_token_id, before.eos_token_ids)
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == list(before.eos_token_ids)


def test_sentencepiece_text_is_the_same_too(saved_model, tmp_path: Path) -> None:
    letters = [chr(c) for c in range(97, 123)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(32)), "\u2581", *letters, "he", "ll", "hell"]
    tokens += ["\u2581hell", "o\u2581", *(f"<x{i}>" for i in range(96))]
    kinds = [2, 3, 3] + [6] * 32 + [1] * (len(tokens) - 35)

    def sentencepiece(writer: gguf.GGUFWriter) -> None:
        for key in ("model", "pre", "tokens", "token_type", "merges"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens[:96])
        writer.add_token_scores([-float(i) for i in range(96)])
        writer.add_token_types(kinds[:96])

    source = write_model(saved_model("llama")[0], tmp_path / "m.gguf", "llama", more=sentencepiece)
    folder = convert(str(source), tmp_path / "hf", to="safetensors")
    before, after = load_tokenizer(source), load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("hello hell", "<s>he</s> llo", "\n\x01x", ""):
        assert before.encode(text) == after.encode(text) == theirs(text).input_ids, text
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))


def test_named_templates_come_along(saved_model, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "{{ tools }}"}]
    source = write_model(
        saved_model("llama")[0], tmp_path / "m.gguf", "llama", more=lambda w: w.add_chat_template(templates)
    )
    folder = convert(str(source), tmp_path / "hf", to="safetensors")
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    expected = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    assert load_tokenizer(folder).chat.templates == load_tokenizer(source).chat.templates == expected
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == expected


def test_a_template_cannot_be_written_outside_the_folder(saved_model, tmp_path: Path) -> None:
    templates = [{"name": "default", "template": TEMPLATE}]
    source = write_model(
        saved_model("llama")[0],
        tmp_path / "m.gguf",
        "llama",
        more=lambda w: (w.add_chat_template(templates), w.add_string("tokenizer.chat_template.../../x", "x")),
    )
    with pytest.raises(ValueError, match="no file name"):
        convert(str(source), tmp_path / "out" / "hf", to="safetensors")
    assert list((tmp_path / "out").iterdir()) == []


def test_every_file_of_a_folder_comes_along(saved_model, tmp_path: Path) -> None:
    source = convert(str(gguf_file("llama", saved_model, tmp_path / "m.gguf")), tmp_path / "first", to="safetensors")
    (source / "added_tokens.json").write_text('{"<more>": 95}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    orbax = convert(str(source), tmp_path / "orbax", to="orbax", dtype="float32")
    folder = convert(str(orbax), tmp_path / "hf", to="safetensors")
    for file in source.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert (folder / file.relative_to(source)).is_file(), file
            assert (orbax / file.relative_to(source)).is_file(), file
    assert load_tokenizer(folder).chat.templates == load_tokenizer(source).chat.templates


# gpt_oss: stacked experts; deepseek_v3: split keys and values; gemma3: shifted norms.
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma3"])
def test_orbax_and_back_gives_the_tensors_of_the_file(name: str, saved_model, tmp_path: Path) -> None:
    source = gguf_file(name, saved_model, tmp_path / "m.gguf")
    orbax = convert(str(source), tmp_path / "orbax", to="orbax", dtype="float32")
    assert load_tokenizer(orbax).encode("it's 42") == load_tokenizer(source).encode("it's 42")
    back = open_checkpoint(convert(str(orbax), tmp_path / "hf", to="safetensors", dtype="float32"))
    expected = open_checkpoint(source)
    assert back.tensors == expected.tensors
    for key in expected.tensors:
        np.testing.assert_allclose(back.read(key), expected.read(key), rtol=0, atol=1e-6, err_msg=key)


def test_the_configuration_says_the_dtype_that_was_written(saved_model, tmp_path: Path) -> None:
    source = saved_model("llama")[0]  # float32
    for dtype, expected in (("auto", torch.bfloat16), ("float16", torch.float16)):
        folder = convert(str(source), tmp_path / dtype, to="safetensors", dtype=dtype)
        assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == expected


def test_what_cannot_be_written_is_one_line(saved_model, tmp_path: Path) -> None:
    source = str(saved_model("llama")[0])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write .*file/out: "):
        convert(source, tmp_path / "file" / "out", to="safetensors")
    with pytest.raises(ValueError, match="dtype 'float99'; use one of auto, float32, bfloat16, float16"):
        convert(source, tmp_path / "out", to="safetensors", dtype="float99")
    assert not (tmp_path / "out").exists()
