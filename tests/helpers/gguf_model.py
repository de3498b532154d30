"""A Hugging Face folder as a GGUF file, with the names, the layouts and the metadata of llama.cpp's converter.

Tensor names come from the `gguf` package's own map. It shares no code with the reader.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from jaxllm.tokenizer.token_bytes import byte_to_unicode

Writer = gguf.GGUFWriter
Tensors = Mapping[str, np.ndarray]
Quant = gguf.GGMLQuantizationType
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_UNROTATED = ("llama", "granite", "granitemoe", "smollm3")


def write_model(
    folder: Path,
    path: Path,
    arch: str,
    *,
    more: Callable[[Writer], object] | None = None,
    quant: Quant = Quant.F32,
    split: int = 0,
    era: int = 2026,
    fuse_experts: bool = False,
) -> Path:
    """Write the model in `folder` to `path`; matrices whose rows allow it are of the type `quant`.

    `more` adds metadata; `split` is the number of tensors per part; `era` is the year of the converter: in 2023 each
    expert had a tensor of its own, in 2024 DeepSeek's keys and values were one. `fuse_experts` writes the gates and ups
    of all experts as one tensor.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = Writer(str(path), arch, split_max_tensors=split)
    _metadata(writer, config, arch, era)
    _vocabulary(writer, config["vocab_size"])
    if more is not None:
        more(writer)
    names = gguf.get_tensor_name_map(_arch(arch), config.get("num_hidden_layers") or config["n_layer"])
    tensors = _tensors(load_file(folder / "model.safetensors"), config, arch, era)
    for name, value in _fused(dict(tensors)) if fuse_experts else tensors:
        stem = name if name.startswith("blk.") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stem is not None, name
        fits = value.ndim > 1 and value.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0] == 0
        kind = quant if fits and not stem.startswith("rope") else Quant.F32
        writer.add_tensor(stem, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, word in gguf.MODEL_ARCH_NAMES.items() if word == name)


def _metadata(writer: Writer, config: Mapping[str, Any], arch: str, era: int) -> None:
    heads = config.get("num_attention_heads") or config["n_head"]
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_embedding_length(config.get("hidden_size") or config["n_embd"])
    writer.add_feed_forward_length(config.get("intermediate_size") or 4 * config["n_embd"])
    writer.add_head_count(heads)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    if "layer_norm_eps" in config:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_head_count_kv(1 if arch == "deepseek2" else config["num_key_value_heads"])
    if arch == "deepseek2":
        _latent(writer, config, era)
    elif head_dim := config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    _rope(writer, config)
    for key, add in (
        ("sliding_window", writer.add_sliding_window),
        ("num_experts_per_tok", writer.add_expert_used_count),
    ):
        if config.get(key) is not None:
            add(config[key])
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if key in config:
            writer.add_expert_count(config[key])
    if size := config.get("moe_intermediate_size"):
        writer.add_expert_feed_forward_length(size)


def _latent(writer: Writer, config: Mapping[str, Any], era: int) -> None:
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    if era < 2025:
        writer.add_key_length(width)
        writer.add_value_length(config["v_head_dim"])
    else:
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(width)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if config.get("norm_topk_prob"):
        writer.add_expert_weights_norm(True)


def _rope(writer: Writer, config: Mapping[str, Any]) -> None:
    rope = config["rope_parameters"]
    full = rope.get("full_attention", rope)
    writer.add_rope_freq_base(float(full["rope_theta"]))
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(float(rope["sliding_attention"]["rope_theta"]))
    if full["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(full["factor"])
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(full["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(full["beta_slow"])
        if weight := full.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(0.1 * weight)
    if full["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(
            config.get("original_max_position_embeddings") or full["original_max_position_embeddings"]
        )
        writer.add_rope_scaling_attn_factors(full["attention_factor"])
    if (part := full.get("partial_rotary_factor", 1.0)) != 1.0:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        writer.add_rope_dimension_count(int(head_dim * part))


def _vocabulary(writer: Writer, size: int) -> None:
    """Bytes, and names for the rest; three control tokens first."""
    letters = list(byte_to_unicode().values())[: size - 3]
    tokens = ["<unk>", "<s>", "</s>", *letters, *(f"<x{i}>" for i in range(size))][:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (size - 3))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(tensors: Tensors, config: Mapping[str, Any], arch: str, era: int) -> Iterator[tuple[str, np.ndarray]]:
    """What the converter of `arch` makes of each tensor, under names that the `gguf` package maps."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        if match := _EXPERT.fullmatch(name):
            w = match[3]
            if era < 2024:
                part = {"w1": "gate", "w2": "down", "w3": "up"}[w]
                yield f"blk.{name.split('.')[2]}.ffn_{part}.{match[2]}.weight", value
                continue
            stem = match[1].replace("block_sparse_moe", "feed_forward").replace("model.layers", "layers")
            stacked = f"{stem if w in ('w1', 'w2', 'w3') else match[1]}.{w}.weight"
            stacks.setdefault(stacked, {})[int(match[2])] = value
            continue
        yield from [(name, value)] if era < 2025 and "kv_b_proj" in name else _one(name, value, config, arch)
    for name, stack in stacks.items():
        yield name, np.stack([stack[i] for i in range(len(stack))])
    rope = config.get("rope_parameters") or {}
    for kind in ("long", "short"):
        if factors := rope.get(f"{kind}_factor"):
            yield f"rope_factors_{kind}.weight", np.array(factors, np.float32)


def _fused(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Gates above ups."""
    for name, value in tensors.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate|up)_proj\.weight", name):
            if match[2] == "gate":
                up = tensors[name.replace("gate_proj", "up_proj")]
                yield f"blk.{match[1]}.ffn_gate_up_exps.weight", np.concatenate((value, up), axis=1)
        else:
            yield name, value


def _one(name: str, value: np.ndarray, config: Mapping[str, Any], arch: str) -> Iterator[tuple[str, np.ndarray]]:
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        yield name, value + 1
    elif arch in _UNROTATED and (match := re.search(r"\.([qk])_proj\.", name)):
        heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        yield name, value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    elif arch == "gpt2":
        if not re.search(r"\.attn\.(masked_)?bias$", name):
            yield name, value.T if re.search(r"\.c_\w+\.weight$", name) else value
    elif arch == "deepseek2" and name.endswith("kv_b_proj.weight"):
        width = config["qk_nope_head_dim"]
        heads = value.reshape(config["num_attention_heads"], width + config["v_head_dim"], -1)
        yield name.replace("kv_b_proj", "k_b_proj"), heads[:, :width].swapaxes(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), heads[:, width:]
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_correction_bias", "_correction.bias"), value
    elif arch == "qwen2moe" and name.endswith("shared_expert_gate.weight"):
        yield name, value.reshape(-1)
    elif match := re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.(input|output)_linear\.weight", name):
        parts = (
            {"down": value} if match[2] == "output" else dict(zip(("gate", "up"), np.split(value, 2, 1), strict=True))
        )
        for part, half in parts.items():
            yield f"blk.{match[1]}.ffn_{part}_exps.weight", half
    elif arch == "gpt-oss":
        yield from _gpt_oss(name, value)
    else:
        yield name, value


def _gpt_oss(name: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    if name.endswith("sinks"):
        yield f"{name}.weight", value
    elif "gate_up_proj" in name:
        is_bias = name.endswith("_bias")
        value = value if is_bias else value.swapaxes(-1, -2)
        for i, part in enumerate(("gate", "up")):
            half = value[:, i::2]
            yield re.sub(r"gate_up_proj(_bias)?$", f"{part}_proj." + ("bias" if is_bias else "weight"), name), half
    elif name.endswith("down_proj"):
        yield f"{name}.weight", value.swapaxes(-1, -2)
    else:
        yield name.replace("down_proj_bias", "down_proj.bias"), value
