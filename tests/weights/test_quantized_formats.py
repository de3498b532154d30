"""Every quantised format against transformers with the values that its codes stand for, on one device and on two."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.torch import load_file

from jaxllm import LLM
from jaxllm.checkpoints import open_checkpoint
from jaxllm.config import EngineConfig
from jaxllm.families import read_config
from jaxllm.families.tensor_names import named
from jaxllm.ops.joined import JoinedMatrix
from jaxllm.ops.quantized import QuantizedMatrix, expand
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.weights.abstract import make_model
from jaxllm.weights.loader import load_parameters
from tests.helpers import quantized_models as made
from tests.helpers.logits import engine_logits

PROMPT = np.random.default_rng(1).integers(3, made.VOCAB, 20).tolist()
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FORMATS: dict[str, tuple[made.Layout, dict[str, Any]]] = {
    "awq": (made.awq, AWQ),
    "gptq": (made.gptq, GPTQ),
    "gptq v2": (functools.partial(made.gptq, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq symmetric": (functools.partial(made.gptq, is_symmetric=True), GPTQ | {"sym": True}),
    "gptq desc_act": (functools.partial(made.gptq, is_permuted=True), GPTQ | {"desc_act": True}),
    "gptq 8 bits": (functools.partial(made.gptq, bits=8), GPTQ | {"bits": 8}),
    "fp8 blocks": (made.fp8_blocks, FP8),
}


def parameters(folder: Path, mesh: str, quantization: str = "auto") -> dict[tuple, np.ndarray]:
    """Every parameter as it was loaded, its values in float32."""
    checkpoint = named(open_checkpoint(folder))
    config = EngineConfig(dtype="float32", quantization=quantization, matmul_backend="xla")  # type: ignore[arg-type]
    placement = Placement(make_mesh(mesh), load_rules("megatron"))
    model = make_model(config, read_config(checkpoint.config), placement, checkpoint)
    params = load_parameters(model, checkpoint)
    assert quantization == "none" or model.schemes
    return {path: values(variable.get_value()) for path, variable in nnx.to_flat_state(params)}


def values(kept: Any) -> np.ndarray:
    """The numbers that an array or a stored matrix stands for."""
    if isinstance(kept, JoinedMatrix):
        return np.concatenate([values(part) for part in kept.parts], axis=kept.axis)
    if not isinstance(kept, QuantizedMatrix):
        return np.asarray(kept)
    wide = np.asarray(expand(kept.codes, kept.scales, kept.minima, kept.scheme, kept.axis, np.dtype(np.float32)))
    if kept.order is not None:
        places = np.argsort(kept.order, axis=-1)
        wide = np.take_along_axis(wide, places.reshape(places.shape + (1,) * (wide.ndim - places.ndim)), kept.axis)
    return wide.reshape(kept.shape)


@pytest.mark.parametrize("kind", ["dense", "routed"])
@pytest.mark.parametrize("name", FORMATS)
def test_parameters_are_the_values_that_the_codes_stand_for(name, kind, tmp_path):
    layout, config = FORMATS[name]
    quantized = made.quantize(kind, layout, config, tmp_path)
    want = parameters(tmp_path / "dense", "tp=1", "none")
    for mesh in ("tp=1",) if kind == "routed" and "desc_act" in name else ("tp=1", "tp=2"):
        got = parameters(quantized.folder, mesh)
        assert got.keys() == want.keys()
        for path, value in got.items():
            np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=f"{path} {mesh}")


def _by_layer(w_NK: np.ndarray) -> tuple[made.Tensors, np.ndarray]:
    """The down projection, whose inputs are most, in 8 bits."""
    return made.gptq(w_NK, 64, 8) if w_NK.shape[1] == 128 else made.gptq(w_NK)


def test_gptq_layers_with_settings_of_their_own(tmp_path):
    dynamic = {"-:model.embed": {}, "+:.*\\.down_proj": {"bits": 8, "group_size": 64, "mse": 2.4}, ".*": {"bits": 4}}
    made.quantize("dense", _by_layer, GPTQ | {"dynamic": dynamic}, tmp_path)
    want, got = parameters(tmp_path / "dense", "tp=1", "none"), parameters(tmp_path, "tp=1")
    for path, value in got.items():
        np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=str(path))
    for wrong, words in [
        ({"-:.*down": {}}, "mlp.down_proj has a qweight, but"),
        ({".*down": {"bits": 3}}, "bits=3"),
        ({".*down": {"format": "marlin"}}, "unknown field format"),
        ({"*": {}}, "dynamic '\\*'"),
    ]:
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"] |= {"dynamic": wrong}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "mesh"),
    [
        ("awq", "dense", "tp=2"),
        ("gptq desc_act", "dense", "tp=2"),
        ("fp8 blocks", "routed", "tp=2"),
        ("gptq symmetric", "routed", "tp=1"),
    ],
)
def test_logits_are_those_of_the_values(name, kind, mesh, tmp_path):
    layout, config = FORMATS[name]
    quantized = made.quantize(kind, layout, config, tmp_path)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        mesh=mesh,
        max_model_len=48,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        page_size=4,
        kv_cache_memory_bytes=1 << 20,
        skip_tokenizer_init=True,
        quantization=config["quant_method"],
    )
    assert len(llm.engine.runner.model.schemes) == 8
    got, want = engine_logits(llm.engine, PROMPT), quantized.logits(PROMPT)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


def test_gpt_oss_experts_are_kept_as_mxfp4(tmp_path):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).save_pretrained(tmp_path / "dense")
    dense = {name: t.float().numpy() for name, t in load_file(tmp_path / "dense" / "model.safetensors").items()}
    tensors = dict(dense)
    for name in [name for name in dense if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        del tensors[name]
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], values = made.mxfp4(dense[name])
        dense[name] = values.astype(np.float32)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    made.save(tmp_path / "dense", dense, config)
    made.save(tmp_path, tensors, config | {"quantization_config": {"quant_method": "mxfp4"}})
    want = parameters(tmp_path / "dense", "tp=1", "none")
    for mesh in ("tp=1", "tp=2"):
        for path, value in parameters(tmp_path, mesh).items():
            np.testing.assert_allclose(value, want[path], rtol=1e-5, atol=1e-6, err_msg=f"{path} {mesh}")
