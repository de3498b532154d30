"""A GGUF file as a Hugging Face checkpoint: its config, its tensor names, its row order.

F32, F16 and BF16 tensors are read as views of the memory-mapped file; block-quantised ones are dequantised to
float32, only the rows that are asked for. Knows nothing of the file layout (gguf_file.py) or of what the
names and metadata mean (gguf_families.py, gguf_config.py).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.base import CheckpointError, TensorInfo
from jaxllm.checkpoints.ggml_types import UNREADABLE
from jaxllm.checkpoints.gguf_config import hf_config, hf_generation_config, llama3_rope_scaling
from jaxllm.checkpoints.gguf_families import Family, family_of, hf_name
from jaxllm.checkpoints.gguf_file import GGUFHeader, GGUFTensor, read_header
from jaxllm.checkpoints.mapped import map_file, release_pages

_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a Hugging Face tensor comes from; `heads` is set where rows have to be un-permuted."""

    tensor: GGUFTensor
    heads: int | None
    offset: float = 0.0  # taken off: see `Family.norm_offset`


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """See `Checkpoint`. `header` is the file's own metadata, where the tokenizer finds its vocabulary."""

    path: Path
    header: GGUFHeader
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    _sources: Mapping[str, _Source]
    _data: np.ndarray
    _map: mmap.mmap

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Read and check the header and map the file.

        Raises:
            CheckpointError: The file is damaged, or its architecture or one of its features is not supported.
        """
        header = read_header(path)
        data, mapping = map_file(path)
        try:
            family = family_of(header.metadata)
            config = _config(family, header, data)
            sources = _sources(family, header, config)
            generation_config = hf_generation_config(header.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        tensors = {
            name: TensorInfo(source.tensor.shape, _PLAIN.get(source.tensor.type, np.dtype("f4")).name)
            for name, source in sources.items()
        }
        return cls(Path(path), header, config, generation_config, tensors, sources, data, mapping)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        source = self._sources[name]
        value = _read(self._data, source.tensor, _row_order(source), index or ())
        return value - np.float32(source.offset) if source.offset else value

    def release(self, name: str) -> None:
        tensor = self._sources[name].tensor
        release_pages(self._map, tensor.offset, tensor.nbytes)


def _config(family: Family, header: GGUFHeader, data: np.ndarray) -> dict[str, Any]:
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError("has no tensor 'token_embd.weight'")
    vocab_size = header.tensors["token_embd.weight"].shape[0]
    config = hf_config(family, header.metadata, vocab_size=vocab_size)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if family.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if factors := header.tensors.get(_ROPE_FACTORS):
        if factors.type != "F32" or family.model_type != "llama" or "rope_scaling" in config:
            raise CheckpointError(f"tensor {_ROPE_FACTORS!r} is not supported in this {family.model_type} model")
        config["rope_scaling"] = llama3_rope_scaling(_read(data, factors, None, ()), config)
    return config


def _sources(family: Family, header: GGUFHeader, config: Mapping[str, Any]) -> dict[str, _Source]:
    sources: dict[str, _Source] = {}
    for name, tensor in header.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        if tensor.type in UNREADABLE:
            raise CheckpointError(f"tensor {name!r} has the type {tensor.type}, which is not supported")
        hf, permuted = hf_name(family, name)
        heads = None
        if permuted:
            heads = config["num_attention_heads" if ".q_proj." in hf else "num_key_value_heads"]
            if tensor.shape[0] != heads * config["head_dim"]:
                expected = f"{heads} heads of {config['head_dim']}"
                raise CheckpointError(f"tensor {name!r} has {tensor.shape[0]} rows; expected {expected}")
        sources[hf] = _Source(tensor, heads, family.norm_offset if hf.endswith("norm.weight") else 0.0)
    _check_layers(sources, config["num_hidden_layers"])
    return sources


def _check_layers(names: Mapping[str, Any], num_layers: int) -> None:
    layers = {int(match[1]) for name in names if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if len(layers) != num_layers or max(layers) != num_layers - 1:
        raise CheckpointError(f"block_count={num_layers} but the tensors are of {len(layers)} blocks")


def _row_order(source: _Source) -> np.ndarray | None:
    """For each Hugging Face row of Q or K, the row of the file that holds it.

    Hugging Face rotates dimension j of a head with j + H/2, so a head's rows are its first halves, then its
    second halves; GGUF's llama rotates neighbours, so there they alternate.
    """
    if source.heads is None:
        return None
    rows = np.arange(source.tensor.shape[0]).reshape(source.heads, -1, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _read(data: np.ndarray, tensor: GGUFTensor, order: np.ndarray | None, index: tuple[slice, ...]) -> np.ndarray:
    raw = data[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.type in _PLAIN:
        whole = raw.view(_PLAIN[tensor.type]).reshape(tensor.shape)
        return whole[index] if order is None else whole[order[index[:1]]][:, *index[1:]]
    if len(tensor.shape) == 1:  # one row of blocks: nothing to choose before dequantising
        values = _dequantize(raw, tensor.type)
        return values[index] if order is None else values[order[index]]
    rows = raw.reshape(*tensor.shape[:-1], -1)
    rows = rows[index[:1]] if order is None else rows[order[index[:1]]]
    return _dequantize(rows, tensor.type)[:, *index[1:]]


def _dequantize(rows: np.ndarray, type_name: str) -> np.ndarray:
    import gguf.quants  # only quantised files need it

    kind = gguf.GGMLQuantizationType[type_name]
    if not rows.size:
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return np.empty((*rows.shape[:-1], rows.shape[-1] // block_bytes * block_elements), np.float32)
    with np.errstate(all="ignore"):  # a scale that is not finite gives weights that are not, as it would in F32
        return gguf.quants.dequantize(rows, kind)
