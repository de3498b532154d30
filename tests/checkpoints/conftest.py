"""Tiny checkpoints for these tests: GGUF files by the `gguf` package's own writer, safetensors by theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

# L layers, D model, N query heads, K KV heads, H head dim, F feed forward, V vocabulary
L, D, N, K, H, F, V = 2, 64, 4, 2, 16, 96, 40
GGUF_SHAPES = {
    "token_embd": (V, D),
    "output_norm": (D,),
    **{
        f"blk.{layer}.{stem}": shape
        for layer in range(L)
        for stem, shape in {
            "attn_norm": (D,),
            "attn_q": (N * H, D),
            "attn_k": (K * H, D),
            "attn_v": (K * H, D),
            "attn_output": (D, N * H),
            "ffn_norm": (D,),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items()
    },
}
Quant = gguf.GGMLQuantizationType
# Every way a tensor can be stored meets every kind of tensor in one of the two layers.
TYPES = [Quant.F32, Quant.F16, Quant.Q8_0, Quant.Q4_1, Quant.BF16]


def tiny_weights() -> dict[str, np.ndarray]:
    """Random float32 weights by GGUF name."""
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in GGUF_SHAPES.items()}


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A tiny model at `path`; `metadata` overrides keys below the architecture's prefix, None removes one."""
    writer = gguf.GGUFWriter(path, arch)
    values: dict[str, Any] = {
        "block_count": L,
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "attention.head_count": N,
        "attention.head_count_kv": K,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100000.0,
        **(metadata or {}),
    }
    for key, value in values.items():
        _add(writer, f"{arch}.{key}", value)
    writer.add_token_list([f"tok{i}" for i in range(V)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * V)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = {name: value for name, value in tiny_weights().items() if name not in without}
    for position, (name, weight) in enumerate((weights | dict(extra or {})).items()):
        kind = TYPES[position % len(TYPES)] if weight.ndim == 2 else Quant.F32
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


@pytest.fixture
def make_gguf(tmp_path: Path) -> Callable[..., Path]:
    """`write_gguf` into a fresh folder."""
    return lambda **changes: write_gguf(tmp_path / "tiny.gguf", **changes)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unchanged tiny llama, not to be written to."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
