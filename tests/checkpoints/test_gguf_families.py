"""Every architecture that loads from a folder is the same model from a GGUF file as llama.cpp's converter writes it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxllm.checkpoints import CheckpointError, open_checkpoint
from jaxllm.checkpoints.gguf.checkpoint import arranged, config_of, family_of
from jaxllm.checkpoints.gguf.families import FAMILIES, WITH_CORRECTION, WITH_EXPERTS, WITH_WINDOW
from jaxllm.checkpoints.gguf.parts import open_parts
from jaxllm.families import read_config
from jaxllm.families.registry import ARCHITECTURES
from jaxllm.tokenizer.gguf_splitting import SPLITTINGS
from tests.helpers.gguf_model import Quant, write_model
from tests.helpers.gguf_models import MODELS


def test_every_architecture_has_a_gguf_name_and_both_are_documented() -> None:
    families = [*FAMILIES.values(), *WITH_EXPERTS.values(), *WITH_WINDOW.values(), *WITH_CORRECTION.values()]
    classes = {family.architecture for family in families}
    assert set(ARCHITECTURES) - classes <= {"MistralForCausalLM"}  # its files say llama
    assert {model.arch for model in MODELS.values()} == set(FAMILIES)
    text = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()
    for name in [*FAMILIES, *classes, *SPLITTINGS]:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("name", MODELS)
def test_configuration_and_tensors_are_those_of_the_folder(name: str, saved_model, tmp_path: Path) -> None:
    folder, _ = saved_model(name)
    path = write_model(folder, tmp_path / "m.gguf", MODELS[name].arch, more=MODELS[name].more)
    expected, got = open_checkpoint(folder), open_checkpoint(path)
    assert read_config(got.config) == read_config(expected.config)
    assert got.tensors == {k: v for k, v in expected.tensors.items() if not k.endswith((".attn.bias", "masked_bias"))}
    for key in got.tensors:
        np.testing.assert_allclose(got.read(key), expected.read(key), rtol=0, atol=1e-6, err_msg=key)


def test_files_from_before_keys_and_values_were_compressed(saved_model, tmp_path: Path) -> None:
    folder, _ = saved_model("deepseek_v3")
    today = open_checkpoint(write_model(folder, tmp_path / "m.gguf", "deepseek2", more=MODELS["deepseek_v3"].more))
    path = write_model(folder, tmp_path / "old.gguf", "deepseek2", more=MODELS["deepseek_v3"].more, era=2024)
    assert "blk.0.attn_kv_b.weight" in open_parts(path).tensors
    old = open_checkpoint(path)
    assert (old.config, old.tensors) == (today.config, today.tensors)
    for key in old.tensors:
        np.testing.assert_array_equal(old.read(key), today.read(key), err_msg=key)


def test_files_of_2023_have_a_tensor_for_each_expert(saved_model, tmp_path: Path) -> None:
    folder, _ = saved_model("mixtral")
    expected = open_checkpoint(folder)
    path = write_model(folder, tmp_path / "old.gguf", "llama", era=2023)
    assert "blk.1.ffn_down.3.weight" in open_parts(path).tensors
    old = open_checkpoint(path)
    assert old.tensors == expected.tensors
    for key in old.tensors:
        np.testing.assert_array_equal(old.read(key), expected.read(key), err_msg=key)


def test_gates_and_ups_may_be_one_tensor(saved_model, tmp_path: Path) -> None:
    folder, _ = saved_model("qwen3_moe")
    expected = open_checkpoint(folder)
    path = write_model(folder, tmp_path / "m.gguf", "qwen3moe", fuse_experts=True)
    assert "blk.1.ffn_gate_up_exps.weight" in open_parts(path).tensors
    fused = open_checkpoint(path)
    assert fused.tensors == expected.tensors
    for key in fused.tensors:
        np.testing.assert_array_equal(fused.read(key), expected.read(key), err_msg=key)
        np.testing.assert_array_equal(fused.read(key, (slice(3, 20, 2),)), expected.read(key)[3:20:2], err_msg=key)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("gemma2", [True, True, False]), ("gemma3", 3), ("olmo3", [True, False] * 2), ("gpt_oss", [False, True])],
)
def test_the_file_may_say_which_layers_have_the_window(name: str, pattern, saved_model, tmp_path: Path) -> None:
    model = MODELS[name]

    def more(writer: gguf.GGUFWriter) -> None:
        if model.more is not None:
            model.more(writer)
        writer.kv_data[0].pop(f"{model.arch}.attention.sliding_window_pattern", None)
        if isinstance(pattern, int):
            writer.add_uint32(f"{model.arch}.attention.sliding_window_pattern", pattern)
        else:
            writer.add_sliding_window_pattern(pattern)

    path = write_model(saved_model(name)[0], tmp_path / "m.gguf", model.arch, more=more)
    cfg = read_config(open_checkpoint(path).config)
    slides = [(i + 1) % pattern != 0 for i in range(cfg.num_layers)] if isinstance(pattern, int) else pattern
    assert cfg.local is not None
    assert cfg.local.layers == tuple(i for i, is_local in enumerate(slides) if is_local)


def test_an_adapter_is_not_taken_for_a_model(saved_model, tmp_path: Path) -> None:
    path = write_model(saved_model("llama")[0], tmp_path / "m.gguf", "llama", more=lambda w: w.add_type("adapter"))
    with pytest.raises(CheckpointError, match=r"general\.type='adapter'"):
        open_checkpoint(path)


SLICES = [(slice(3, 9),), (slice(None), slice(1, 30)), (slice(5, 5),), (slice(1, 20, 3), slice(None, None, 2)), ()]


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("index", SLICES, ids=str)
def test_a_part_of_a_tensor_is_that_part_of_the_whole(name: str, index: tuple, saved_model, tmp_path: Path) -> None:
    path = write_model(saved_model(name)[0], tmp_path / "m.gguf", MODELS[name].arch, more=MODELS[name].more)
    checkpoint = open_checkpoint(path)
    for key, info in checkpoint.tensors.items():
        part, whole = index[: len(info.shape)], checkpoint.read(key)
        np.testing.assert_array_equal(checkpoint.read(key, part), whole[part], err_msg=key)
        checkpoint.release(key)


@pytest.mark.parametrize(("name", "quant"), [("mixtral", Quant.Q8_0), ("gpt_oss", Quant.Q8_0), ("gpt2", Quant.Q4_0)])
def test_quantised_tensors_are_what_the_gguf_package_reads(
    name: str, quant: Quant, saved_model, tmp_path: Path
) -> None:
    folder, _ = saved_model(name)
    path = write_model(folder, tmp_path / "m.gguf", MODELS[name].arch, more=MODELS[name].more, quant=quant)
    exact, got = open_checkpoint(folder), open_checkpoint(path)
    whole = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    if name == "mixtral":
        key, stored = "model.layers.1.block_sparse_moe.experts.2.w2.weight", whole["blk.1.ffn_down_exps.weight"][2]
    elif name == "gpt2":
        key, stored = "transformer.h.1.mlp.c_fc.weight", whole["blk.1.ffn_up.weight"].T
    else:
        key = "model.layers.0.mlp.experts.gate_up_proj"
        stored = np.stack([whole[f"blk.0.ffn_{n}_exps.weight"].swapaxes(1, 2) for n in ("gate", "up")], -1)
        stored = stored.reshape(4, 64, 192)
    np.testing.assert_array_equal(got.read(key), stored)
    assert not np.array_equal(got.read(key), exact.read(key))
    assert np.abs(got.read(key) - exact.read(key)).max() < 0.1


# Those whose files differ most from the folder; with JAXLLM_FULL_TESTS=1 all.
COMPUTED = (
    tuple(MODELS)
    if os.environ.get("JAXLLM_FULL_TESTS")
    else ("mixtral", "gemma3", "phi3_long", "deepseek_v3", "gpt_oss")
)


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_equal_transformers(name: str, saved_model, tmp_path: Path) -> None:
    import torch

    from jaxllm import LLM
    from tests.helpers.logits import engine_logits

    folder, model = saved_model(name)
    path = write_model(folder, tmp_path / "m.gguf", MODELS[name].arch, more=MODELS[name].more)
    prompt = np.random.default_rng(0).integers(3, 96, 30).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0].numpy()
    llm = LLM(
        str(path),
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        max_model_len=64,
        kv_cache_memory_bytes=8 << 20,
    )
    np.testing.assert_allclose(engine_logits(llm.engine, prompt), expected, atol=1e-3, rtol=0)


WRONG = ["text", -1, 0, 2**40, 2.5, float("nan"), float("inf"), True, [], [1, "a"], [[1]], None]


@pytest.mark.parametrize("name", ["smollm3", "gemma3", "olmo3", "phi3_long", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_metadata_of_any_type_and_size_gives_a_model_or_one_line(name: str, saved_model, tmp_path: Path) -> None:
    path = write_model(saved_model(name)[0], tmp_path / "m.gguf", MODELS[name].arch, more=MODELS[name].more)
    parts = open_parts(path)
    tops, blocks = arranged(parts)
    for key in [key for key in parts.metadata if not key.startswith(("tokenizer.ggml.tok", "general."))]:
        for value in WRONG:
            changed = replace(parts, metadata={**parts.metadata, key: value})
            try:
                config_of(family_of(changed), changed, tops, blocks)
            except CheckpointError as error:
                assert "\n" not in str(error)
