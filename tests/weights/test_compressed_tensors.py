"""compressed-tensors files made by the library of that name, against the values that it decompresses them to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams

from jaxllm import LLM
from tests.helpers import quantized_models as made
from tests.helpers.logits import engine_logits
from tests.weights.test_quantized_formats import PROMPT, parameters

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", INT4),
    "w4a16 per channel": ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}),
    "w4a16 asymmetric": ("pack-quantized", INT4 | {"symmetric": False}),
    "w8a16": ("pack-quantized", INT8),
    "w8a16 asymmetric": ("pack-quantized", INT8 | {"symmetric": False, "strategy": "group", "group_size": 16}),
    "int8": ("int-quantized", INT8),
    "int8 per tensor": ("int-quantized", INT8 | {"strategy": "tensor"}),
    "fp8": ("float-quantized", FP8),
    "fp8 per tensor": ("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8 blocks": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [32, 32]}),
}


def layout(name: str, **activations: Any) -> tuple[made.Layout, dict[str, Any]]:
    """Compressed by the library, and the configuration that says so."""
    kind, arguments = CASES[name]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(kind)

    def compress(w_NK: np.ndarray) -> tuple[made.Tensors, np.ndarray]:
        w = torch.from_numpy(w_NK)
        scale, zero = qparams(w, scheme.weights)
        state = compressor.compress({"weight": w, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        state = {
            key: value for key, value in state.items() if key != "weight_zero_point" or not scheme.weights.symmetric
        }
        values = compressor.decompress(dict(state), scheme)["weight"]
        return {key: made.numpy_of(value) for key, value in state.items()}, values.float().numpy()

    group = {"targets": ["Linear"], "weights": arguments, "input_activations": activations or None}
    config = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
    return compress, config


def qparams(w: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's scales and zero points of the least and largest of each group."""
    if args.strategy == "tensor":
        low, high = w.min().reshape(1), w.max().reshape(1)
    elif args.strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    elif args.strategy == "group":
        grouped = w.reshape(w.shape[0], -1, args.group_size)
        low, high = grouped.amin(-1), grouped.amax(-1)
    else:
        tall, wide = args.block_structure
        blocks = w.reshape(w.shape[0] // tall, tall, w.shape[1] // wide, wide)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return calculate_qparams(low, high, args)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_the_library_decompresses(name: str, tmp_path: Path) -> None:
    quantized = made.quantize("dense", *layout(name), tmp_path)
    want = parameters(tmp_path / "dense", "tp=1", "none")
    for mesh in ("tp=1", "tp=2"):
        for path, value in parameters(quantized.folder, mesh).items():
            np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=f"{path} {mesh}")


def test_a_layer_that_is_left_out_stays_as_it_is_inside_a_joined_one(tmp_path: Path) -> None:
    compress, config = layout("w4a16")
    config["ignore"] += ["model.layers.0.self_attn.v_proj", "re:.*layers.1.*down_proj"]
    skip = "layers.1.mlp.experts|layers.0.self_attn.v_proj"
    made.quantize("routed", compress, config, tmp_path, skip=skip)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*no tensor"):
        parameters(tmp_path, "tp=1")
    config["ignore"] += ["re:.*layers.1.mlp.experts.*"]
    quantized = made.quantize("routed", compress, config, tmp_path / "b", skip=skip)
    want = parameters(tmp_path / "b" / "dense", "tp=1", "none")
    for path, value in parameters(quantized.folder, "tp=2").items():
        np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_activations_are_rounded_as_the_library_does(tmp_path: Path) -> None:
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    quantized = made.quantize("dense", *layout("fp8", **activations), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    want = made.Quantized(tmp_path, theirs).logits(PROMPT)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        max_model_len=48,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        page_size=4,
        kv_cache_memory_bytes=1 << 20,
        skip_tokenizer_init=True,
    )
    got = engine_logits(llm.engine, PROMPT)
    assert np.abs(got - want).max() < 0.25 * np.abs(quantized.logits(PROMPT) - want).max()
