"""A GGUF model as a Hugging Face checkpoint: its config, its tensor names, its row order.

F32, F16 and BF16 tensors are read as views of the memory-mapped files; block-quantised ones are dequantised to
float32, only the rows that are asked for. Knows nothing of the file layout (gguf_file.py) or of what the names and
metadata mean (gguf_families.py, gguf_config.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import CheckpointError, TensorInfo
from jaxllm.checkpoints.gguf.config import hf_config, hf_generation_config, renamed
from jaxllm.checkpoints.gguf.families import FAMILIES, WITH_CORRECTION, WITH_EXPERTS, WITH_WINDOW
from jaxllm.checkpoints.gguf.family import Family
from jaxllm.checkpoints.gguf.ggml_types import UNREADABLE
from jaxllm.checkpoints.gguf.parts import GGUFParts, open_parts
from jaxllm.checkpoints.gguf.quantized import GGUFQuantized, quantized_sources
from jaxllm.checkpoints.gguf.rope import llama3_scaling, longrope_scaling
from jaxllm.checkpoints.gguf.rules import one_expert
from jaxllm.checkpoints.gguf.sources import Shifted, Source, Stored, Zeros

_ROPE_FACTORS = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# No leading zeros: blk.0 and blk.00 would be the same layer.
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(\w+(?:\.\w+)*)\.(weight|bias)", re.ASCII)
_TOP_TENSOR = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(0|[1-9][0-9]{0,4})", re.ASCII)

Blocks = dict[int, dict[str, Stored]]


@dataclass(frozen=True, slots=True)
class GGUFCheckpoint:
    """See `Checkpoint`. `metadata` is the file's own, where the tokenizer finds its vocabulary."""

    path: Path
    metadata: Mapping[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    quantized: Mapping[str, GGUFQuantized]
    _sources: Mapping[str, Source]

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Read and check the headers and map the files.

        Raises:
            CheckpointError: A file is damaged or missing, or its architecture or a feature is not supported.
        """
        path = Path(path)
        parts = open_parts(path)
        try:
            family = family_of(parts)
            tops, blocks = arranged(parts)
            config = config_of(family, parts, tops, blocks)
            sources = _sources(family, tops, blocks, config)
            config, generation_config = renamed(family, config), hf_generation_config(parts.metadata)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        tensors = {name: TensorInfo(source.shape, source.dtype.name) for name, source in sources.items()}
        quantized = quantized_sources(sources)
        return cls(path, parts.metadata, config, generation_config, tensors, quantized, sources)

    @property
    def method(self) -> str | None:
        """How its tensors are quantised."""
        return "gguf" if self.quantized else None

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._sources[name].read(index or ())

    def release(self, name: str) -> None:
        self._sources[name].release()


def family_of(parts: GGUFParts) -> Family:
    """The family that `general.architecture` names, with what the file has of it.

    Raises:
        CheckpointError: It is none of `FAMILIES`.
    """
    if (kind := parts.metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"general.type={kind!r}: it is no model of its own; name the language model's file")
    name = parts.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"general.architecture={name!r} is not supported as GGUF; expected one of: {known}")
    if parts.metadata.get(f"{name}.expert_count") and name in WITH_EXPERTS:
        return WITH_EXPERTS[name]
    if parts.metadata.get(f"{name}.attention.sliding_window") and name in WITH_WINDOW:
        return WITH_WINDOW[name]
    is_sigmoid = parts.metadata.get(f"{name}.expert_gating_func") == 2
    if name in WITH_CORRECTION and (is_sigmoid or any(".exp_probs_b." in tensor for tensor in parts.tensors)):
        return WITH_CORRECTION[name]
    return FAMILIES[name]


def arranged(parts: GGUFParts) -> tuple[dict[str, Stored], Blocks]:
    """The tensors outside the blocks, and those of each block, by the rest of their names."""
    tops: dict[str, Stored] = {}
    blocks: Blocks = {}
    for name, (tensor, part) in parts.tensors.items():
        if tensor.type in UNREADABLE:
            raise CheckpointError(f"tensor {name!r} has the type {tensor.type}, which is not supported")
        if match := _BLOCK_TENSOR.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[f"{match[2]}.{match[3]}"] = Stored(tensor, part)
        else:
            tops[name] = Stored(tensor, part)
    return tops, blocks


def config_of(family: Family, parts: GGUFParts, tops: Mapping[str, Stored], blocks: Blocks) -> dict[str, Any]:
    """The config: what the metadata says and what only the tensors know. Raises CheckpointError."""
    if "token_embd.weight" not in tops:
        raise CheckpointError("has no tensor 'token_embd.weight'")
    try:
        config = hf_config(family, parts.metadata, vocab_size=tops["token_embd.weight"].shape[0])
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # of another type than anybody writes
        raise CheckpointError(f"the metadata cannot be understood ({type(error).__name__}: {error})") from None
    config["tie_word_embeddings"] = "output.weight" not in tops
    first = blocks.get(0, {})
    for word, (stems, _) in family.biases.items():
        config[word] = any(f"{stem}.bias" in first for stem in stems)
    config |= {word: name in first for word, name in family.flags.items()}
    if _ROPE_FACTORS in tops:
        if "rope_scaling" in config:
            raise CheckpointError(f"tensor {_ROPE_FACTORS!r} beside rope.scaling.type is not supported")
        config["rope_scaling"] = llama3_scaling(_factors(tops, _ROPE_FACTORS), config)
    if (_LONG in tops) != (_SHORT in tops) or (_LONG in tops and family.model_type != "phi3"):
        raise CheckpointError(f"tensors {_LONG!r} and {_SHORT!r} go together, in phi3 files only")
    if _LONG in tops:
        prefix = parts.metadata["general.architecture"] + "."
        values = {key.removeprefix(prefix): value for key, value in parts.metadata.items()}
        config["rope_scaling"] = longrope_scaling(_factors(tops, _SHORT), _factors(tops, _LONG), values)
    return config


def _factors(tops: Mapping[str, Stored], name: str) -> np.ndarray:
    if tops[name].dtype != np.float32 or len(tops[name].shape) != 1:
        raise CheckpointError(f"tensor {name!r} is not a vector of F32")
    return tops[name].read()


def _sources(
    family: Family, tops: Mapping[str, Stored], blocks: Blocks, config: Mapping[str, Any]
) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name, stored in tops.items():
        match = _TOP_TENSOR.fullmatch(name)
        if match and match[1] in family.tops:
            sources[f"{family.tops[match[1]]}.{match[2]}"] = stored
        elif name not in (_ROPE_FACTORS, _LONG, _SHORT):
            raise CheckpointError(f"tensor {name!r} has no place in a {family.model_type} model")
    num_layers = config["num_hidden_layers"]
    if (have := sum(layer < num_layers for layer in blocks)) != num_layers:
        raise CheckpointError(f"block_count={num_layers} but the tensors are of {have} blocks")
    for layer in range(num_layers):
        for name, source in _layer(family, layer, blocks[layer], config):
            sources[f"{family.layer}.{layer}.{name}"] = source
    if family.norm_offset:
        norms = {name for name in sources if name.endswith("norm.weight")}
        sources |= {name: Shifted(sources[name], family.norm_offset) for name in norms}
    return sources


def _layer(
    family: Family, layer: int, block: Mapping[str, Stored], config: Mapping[str, Any]
) -> list[tuple[str, Source]]:
    made: list[tuple[str, Source]] = []
    for name in block:
        stem, _, kind = name.rpartition(".")
        rule = family.rules.get(stem)
        if match := _ONE_EXPERT.fullmatch(stem):
            rule = one_expert(family.expert_names[match[1]], int(match[2])) if family.expert_names else None
        if rule is None:
            raise CheckpointError(f"tensor 'blk.{layer}.{name}' has no place in a {family.model_type} model")
        try:
            made += rule(block, stem, kind, config)
        except CheckpointError as error:
            raise CheckpointError(f"blk.{layer}: {error}") from None
    names = {name for name, _ in made}
    for word, (_, stems) in family.biases.items():
        if config[word]:
            weights = dict(made)
            made += [
                (f"{stem}.bias", Zeros(weights[f"{stem}.weight"].shape[:1]))
                for stem in stems
                if f"{stem}.bias" not in names and f"{stem}.weight" in names
            ]
    return made
