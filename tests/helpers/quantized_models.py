"""Tiny checkpoints in every quantised format: bytes packed here from the published layouts, or by the format's library.

A `Layout` takes a linear `[N, K]` and gives the tensors that a file has in its place, and the values they stand for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

VOCAB = 96
_RNG = np.random.default_rng(5)
Tensors = dict[str, np.ndarray]
Layout = Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Quantized:
    """A folder, and the model whose weights are what the folder's stand for."""

    folder: Path
    model: Any

    def logits(self, prompt: list[int]) -> np.ndarray:
        """What transformers computes in float32."""
        with torch.no_grad():
            return self.model(torch.tensor([prompt])).logits[0].float().numpy()


def model_of(kind: str) -> Any:
    """A random model of transformers, `dense` or `routed`, with weights that matter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    if kind == "dense":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    else:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "experts" in name else 0.15)
    return model.eval()


def linears_of(tensors: Tensors) -> list[str]:
    """The blocks' linears, routers left out."""
    return [name for name in tensors if name.endswith(("_proj.weight",)) and name.startswith("model.layers.")]


def quantize(kind: str, layout: Layout, config: dict[str, Any], folder: Path, skip: str = "never") -> Quantized:
    """Save a model with its linears in this layout (but those whose name `skip` is found in)."""
    model = model_of(kind)
    model.save_pretrained(folder / "dense")
    from safetensors.torch import load_file

    tensors = {name: t.float().numpy() for name, t in load_file(folder / "dense" / "model.safetensors").items()}
    dense = dict(tensors)
    for name in linears_of(tensors):
        if re.search(skip, name):
            continue
        made, values = layout(tensors.pop(name))
        dense[name] = values.astype(np.float32)
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": tensor for suffix, tensor in made.items()}
    save_file(
        {name: np.ascontiguousarray(t) for name, t in dense.items()},
        folder / "dense" / "model.safetensors",
        {"format": "pt"},
    )
    save(folder, tensors, json.loads((folder / "dense" / "config.json").read_text()) | {"quantization_config": config})
    reference = type(model).from_pretrained(folder / "dense", dtype=torch.float32).eval()
    return Quantized(folder, reference)


def save(folder: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """A folder as Hugging Face has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Of any dtype."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def pack_rows(codes: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words of codes along an axis: code by code from the lowest bits up, or in another order."""
    count = 32 // bits
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    grouped = codes.reshape(*codes.shape[:-1], -1, count)
    words = np.zeros(grouped.shape[:-1], np.uint32)
    for nth in range(count):
        words |= grouped[..., nth if order is None else order[nth]] << np.uint32(bits * nth)
    return np.moveaxis(words, -1, axis).view(np.int32)


def asymmetric(w_NK: np.ndarray, group: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[N, K]`, scales and zeros `[N, J]`, of values between the least and the largest of each group."""
    n, k = w_NK.shape
    grouped = w_NK.reshape(n, k // group, group)
    least, most = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
    scales = ((most - least) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.round(-least / scales), 0, 2**bits - 1)
    codes = np.clip(np.round(grouped / scales[..., None]) + zeros[..., None], 0, 2**bits - 1)
    return codes.reshape(n, k), scales, zeros


def values_of(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float, group: int) -> np.ndarray:
    """`scale * (code - zero)`."""
    n, k = codes.shape
    grouped = codes.astype(np.float64).reshape(n, k // group, group) - np.asarray(zeros)[..., None]
    return (grouped * scales[..., None]).reshape(n, k)


def awq(w_NK: np.ndarray, group: int = 32) -> tuple[Tensors, np.ndarray]:
    """AutoAWQ's gemm layout."""
    codes, scales, zeros = asymmetric(w_NK, group, 4)
    tensors = {
        "qweight": pack_rows(codes.T, 4, 1, AWQ),
        "qzeros": pack_rows(zeros.T, 4, 1, AWQ),
        "scales": scales.T.astype(np.float16),
    }
    return tensors, values_of(codes, scales, zeros, group)


def gptq(
    w_NK: np.ndarray,
    group: int = 32,
    bits: int = 4,
    version: int = 1,
    is_permuted: bool = False,
    is_symmetric: bool = False,
) -> tuple[Tensors, np.ndarray]:
    """AutoGPTQ's (1) or GPTQModel's (2) layout."""
    n, k = w_NK.shape
    order = _RNG.permutation(k) if is_permuted else np.arange(k)
    codes, scales, zeros = asymmetric(w_NK[:, order], group, bits)
    if is_symmetric:
        zeros = np.full_like(zeros, 1 << bits - 1)
        scales = (np.abs(w_NK[:, order]).reshape(n, -1, group).max(-1) / (2 ** (bits - 1) - 1)).astype(np.float16)
        scales = scales.astype(np.float32)
        codes = np.round(w_NK[:, order].reshape(n, -1, group) / scales[..., None]).reshape(n, k) + (1 << bits - 1)
    values = np.empty((n, k))
    values[:, order] = values_of(codes, scales, zeros, group)
    own, g_idx = np.empty_like(codes), np.empty(k, np.int32)
    own[:, order], g_idx[order] = codes, np.arange(k) // group
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    tensors = {
        "qweight": pack_rows(own.T, bits, 0),
        "qzeros": pack_rows(stored.T, bits, 1),
        "scales": scales.T.astype(np.float16),
        "g_idx": g_idx,
    }
    return tensors, values


def fp8_blocks(w_NK: np.ndarray, tall: int = 32, wide: int = 32) -> tuple[Tensors, np.ndarray]:
    """DeepSeek-V3's layout."""
    n, k = w_NK.shape
    outputs, inputs = np.arange(n) // tall, np.arange(k) // wide
    scales = np.empty((-(-n // tall), -(-k // wide)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[i, j] = np.abs(w_NK[outputs == i][:, inputs == j]).max() / 448
    each = scales[np.ix_(outputs, inputs)]
    codes = (w_NK / each).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.astype(np.float64) * each


def mxfp4(w_EKN: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """gpt-oss' `*_blocks` and `*_scales` of `[E, K, N]`, and the values they stand for."""
    e, k, n = w_EKN.shape
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    grouped = w_EKN.swapaxes(1, 2).reshape(e, n, k // 32, 32).astype(np.float64)
    exponents = np.ceil(np.log2(np.abs(grouped).max(-1) / 6)).astype(int)
    scaled = grouped / 2.0 ** exponents[..., None]
    codes = np.argmin(np.abs(scaled[..., None] - table), axis=-1).astype(np.uint8)
    values = (table[codes] * 2.0 ** exponents[..., None]).reshape(e, n, k).swapaxes(1, 2)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8), values
