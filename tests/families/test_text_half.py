"""Of checkpoints that also see, the text half gives the numbers of the whole model on a text."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers

from jaxllm.families import notices, read_config
from jaxllm.families.architecture_fields import RULES
from jaxllm.families.text_half import DEFAULTS, WITH_EYES, text_name

SIZES = {
    "vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip
CLIP = SIGLIP | {"model_type": "clip_vision_model"}
QWEN_VISION = {
    "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
TEXTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the text half, of the eyes
    "Gemma3ForConditionalGeneration": (
        {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 20}, SIGLIP
    ),
    "Mistral3ForConditionalGeneration": (
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14},
    ),
    "LlavaForConditionalGeneration": ({"model_type": "llama"}, CLIP),
    "LlavaNextForConditionalGeneration": ({"model_type": "mistral"}, CLIP),
    "LlavaOnevisionForConditionalGeneration": ({"model_type": "qwen2"}, SIGLIP),
    "Idefics3ForConditionalGeneration": ({"model_type": "llama"}, SIGLIP | {"model_type": "idefics3_vision"}),
    "SmolVLMForConditionalGeneration": ({"model_type": "llama"}, SIGLIP | {"model_type": "smolvlm_vision"}),
    "InternVLForConditionalGeneration": (
        {"model_type": "qwen3", "head_dim": 32}, SIGLIP | {"model_type": "internvl_vision", "image_size": [28, 28],
                                                           "patch_size": [14, 14]},
    ),
    "Qwen2VLForConditionalGeneration": ({"model_type": "qwen2_vl_text", **MROPE}, QWEN_VISION),
    "Qwen2_5_VLForConditionalGeneration": ({"model_type": "qwen2_5_vl_text", **MROPE}, QWEN_VISION),
    "Qwen3VLForConditionalGeneration": ({"model_type": "qwen3_vl_text", "head_dim": 16, **MROPE}, QWEN_VISION),
}  # fmt: skip

# With JAXLLM_FULL_TESTS=1 all; by default those with something of their own: file names, defaults, three positions.
FEW = ("Gemma3ForConditionalGeneration", "Idefics3ForConditionalGeneration", "Qwen2VLForConditionalGeneration")
COMPARED = tuple(WITH_EYES) if os.environ.get("JAXLLM_FULL_TESTS") else FEW


def save(architecture: str, folder: Path) -> Any:
    """Save the whole tiny model and return it."""
    text, eyes = TEXTS[architecture]
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(text_config=SIZES | text, vision_config=eyes, image_token_id=5)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vision" not in name and "visual" not in name:
                value.add_(torch.randn_like(value) * (0.4 if value.ndim == 1 else 0.15))
    model.save_pretrained(folder)
    return model


def test_every_architecture_that_sees_is_compared() -> None:
    assert set(TEXTS) == set(WITH_EYES)


@pytest.mark.parametrize("architecture", COMPARED)
def test_logits_and_greedy_tokens_of_a_text_equal_transformers(architecture: str, tmp_path: Path, load, caplog) -> None:
    model = save(architecture, tmp_path)
    prompts = [np.random.default_rng(0).integers(6, tiny.VOCAB, 21).tolist()]
    logits, tokens = tiny.reference(model, prompts, 32)
    notices.say_once.cache_clear()
    loaded = load(tmp_path)
    np.testing.assert_allclose(loaded.logits(prompts[0]), logits[0], atol=1e-3, rtol=0)
    assert loaded.generate(prompts, 32) == tokens
    assert [r.message for r in caplog.records if f"{architecture}: its text half is loaded" in r.message]


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_what_a_text_half_leaves_out_is_what_transformers_takes(architecture: str) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(getattr(transformers, RULES[architecture].config_class))}
    assert DEFAULTS[architecture] == {name: defaults[name] for name in DEFAULTS[architecture]}


def test_a_published_gemma_3_file_says_only_what_differs_from_the_defaults() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    cfg = read_config({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}})
    assert cfg.num_parameters == 4_300_079_472 - 419_816_304  # as published, without SigLIP and the projector
    assert (cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.vocab_size) == (8, 4, 256, 262208)


def test_an_older_qwen2_vl_file_has_the_text_fields_beside_those_of_the_eyes(tmp_path: Path) -> None:
    save("Qwen2VLForConditionalGeneration", tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    flat = {**hf.pop("text_config"), **hf, "model_type": "qwen2_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat["rope_theta"] = flat.pop("rope_parameters")["rope_theta"]
    assert read_config(flat) == read_config(json.loads((tmp_path / "config.json").read_text()))


def test_a_text_half_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"text half of this LlavaForConditionalGeneration is a 'opt'"):
        read_config({"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}})


@pytest.mark.parametrize(("theirs", "ours"), [
    ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("model.language_model.norm.weight", "model.norm.weight"),
    ("model.text_model.norm.weight", "model.norm.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("vision_tower.x.weight", None), ("model.multi_modal_projector.x", None), ("visual.blocks.0.x", None),
])  # fmt: skip
def test_names_of_older_and_newer_files_lead_to_one(theirs: str, ours: str | None) -> None:
    assert text_name(theirs) == ours
