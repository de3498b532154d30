"""`convert --quantize`: what is written is what the compressed-tensors library reads, and what is served here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from jaxllm.checkpoints import open_checkpoint
from jaxllm.weights.convert import convert
from tests.helpers import quantized_models as made
from tests.weights.test_quantized_formats import parameters


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    made.model_of("routed").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.006), ("int4:32", 0.1), ("int4", 0.1), ("fp8", 0.04)])
def test_the_library_reads_what_was_written(kind: str, error: float, dense: Path, tmp_path: Path) -> None:
    convert(str(dense), tmp_path / "new", to="safetensors", dtype="float32", quantize=kind)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    )
    scheme, tensors = config.config_groups["group_0"], load_file(tmp_path / "new" / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(config.format)
    layer = "model.layers.0.self_attn.o_proj"
    state = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
    theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
    ours = open_checkpoint(tmp_path / "new").read(f"{layer}.weight")
    want = open_checkpoint(dense).read(f"{layer}.weight")
    np.testing.assert_allclose(ours, theirs, rtol=4e-3)  # theirs are rounded to the type of the scales
    assert 0 < np.abs(theirs - want).max() < error * np.abs(want).max()
    assert "lm_head" in config.ignore and "model.layers.0.mlp.gate" in config.ignore
    assert parameters(tmp_path / "new", "tp=1").keys() == parameters(dense, "tp=1", "none").keys()
    assert torch.is_tensor(tensors["lm_head.weight"])


def test_what_cannot_be_rounded_is_refused_in_one_line(dense: Path, tmp_path: Path) -> None:
    for kind, words in [
        ("int3", "int3"),
        ("int8:32", "int8:32"),
        ("int4:48", "o_proj.weight: its 64 inputs"),
        ("", "int4:GROUP"),
    ]:
        with pytest.raises(ValueError, match=words if "o_proj" not in words else "its 64 inputs do not divide"):
            convert(str(dense), tmp_path / "new", to="safetensors", quantize=kind)
    with pytest.raises(ValueError, match="safetensors"):
        convert(str(dense), tmp_path / "new", to="orbax", quantize="int8")
