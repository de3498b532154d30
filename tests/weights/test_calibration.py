"""`convert --quantize --calibration`: the decoder a block at a time, and what it makes of a model on a text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from jaxllm.checkpoints import open_checkpoint
from jaxllm.commands import convert as command
from jaxllm.weights.calibration import Calibration
from jaxllm.weights.convert import convert
from jaxllm.weights.layerwise import LayerwiseDecoder
from tests.helpers import quantized_models as made
from tests.helpers.byte_tokenizer import write_byte_tokenizer
from tests.weights.test_quantized_formats import parameters

TEXT = "To be, or not to be: that is the question. Whether 'tis nobler in the mind to suffer. " * 8


@pytest.fixture(scope="module", params=["dense", "routed"])
def model(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    made.model_of(request.param).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(3, made.VOCAB, (8, 64), np.int32)


def logits(folder: Path) -> np.ndarray:
    decoder = LayerwiseDecoder(open_checkpoint(folder), 64)
    states = [decoder.embedded(batch) for batch in decoder.batches(tokens())]
    for layer in range(decoder.cfg.num_layers):
        values = decoder.block(layer)
        states = [decoder.run(layer, values, x)[0] for x in states]
    return np.concatenate([np.asarray(decoder.logits(x)) for x in states])


def test_block_by_block_is_what_transformers_computes(model: Path) -> None:
    with torch.no_grad():
        theirs = made.model_of("dense" if "dense" in model.name else "routed")(torch.tensor(tokens())).logits
    np.testing.assert_allclose(logits(model), theirs.reshape(-1, made.VOCAB).numpy(), atol=2e-4)


def test_a_calibrated_model_stays_closer_to_what_it_was(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("jaxllm.weights.calibration.calibration_tokens", lambda *_: tokens())
    convert(str(model), tmp_path / "nearest", to="safetensors", dtype="float32", quantize="int4:32")
    calibration = Calibration(Path("text"))
    convert(
        str(model), tmp_path / "gptq", to="safetensors", dtype="float32", quantize="int4:32", calibration=calibration
    )
    want = logits(model)
    nearest, calibrated = (np.square(logits(tmp_path / name) - want).mean() for name in ("nearest", "gptq"))
    assert 0 < calibrated < 0.7 * nearest
    assert parameters(tmp_path / "gptq", "tp=1").keys() == parameters(tmp_path / "nearest", "tp=1").keys()
    files = [open_checkpoint(tmp_path / name) for name in ("gptq", "nearest")]
    assert files[0].tensors == files[1].tensors


def test_bad_texts_are_refused_before_anything_is_written(model: Path, text: Path, tmp_path: Path) -> None:
    def refused(words: str, file: Path, **options) -> None:
        with pytest.raises(ValueError, match=words):
            convert(str(model), tmp_path / "new", to="safetensors", calibration=Calibration(file), **options)
        assert not (tmp_path / "new").exists()

    refused("--quantize", text)
    refused("No such file", tmp_path / "nothing", quantize="int4")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    refused("UTF-8", tmp_path / "binary", quantize="int4")


def test_a_text_is_cut_into_spans_of_the_models_length(model: Path, text: Path, tmp_path: Path) -> None:
    from jaxllm.weights.calibration import calibration_tokens

    write_byte_tokenizer(model)
    checkpoint = open_checkpoint(model)
    assert calibration_tokens(checkpoint, Calibration(text, 300)).shape == (4, 64)
    (tmp_path / "short").write_text("Short.", encoding="utf-8")
    with pytest.raises(ValueError, match="calibration needs 128"):
        calibration_tokens(checkpoint, Calibration(tmp_path / "short"))


def test_flags_of_a_text_need_the_text() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(ValueError, match="--calibration FILE"):
        command.run(parser.parse_args(["a", "b", "--quantize", "int4", "--calibration-tokens", "9"]))


@pytest.mark.parametrize(("name", "group"), [("phi3", 16), ("deepseek_v3", 4)])
def test_fused_tensors_are_rounded_whole_and_what_no_product_shows_to_nearest(
    name: str, group: int, tiny_model, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr("jaxllm.weights.calibration.calibration_tokens", lambda *_: tokens()[:, :32] % 90)
    folder = tiny_model(name).folder
    for kind, calibration in (("nearest", None), ("gptq", Calibration(Path("text")))):
        options = {"dtype": "float32", "quantize": f"int4:{group}", "calibration": calibration}
        convert(str(folder), tmp_path / kind, to="safetensors", **options)
    files = [open_checkpoint(tmp_path / kind) for kind in ("nearest", "gptq")]
    assert files[0].tensors == files[1].tensors
    changed = {key for key in files[0].quantized if (files[0].read(key) != files[1].read(key)).any()}
    same = files[0].quantized.keys() - changed
    unseen = [key for key in files[0].quantized if "kv_b_proj" in key]
    assert changed and sorted(same) == sorted(unseen) and bool(unseen) == (name == "deepseek_v3")
    assert not unseen or "rounded to nearest" in caplog.text
