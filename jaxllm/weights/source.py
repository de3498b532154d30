"""Where a model's parameters come from: a name -> configuration, defaults and parameters.

A checkpoint of tensors, an Orbax folder, or (`load_format="dummy"`) random numbers of any configuration. Everything
that follows asks the source, not what kind it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.checkpoints import Checkpoint, model_files, open_checkpoint, resolve_model
from jaxllm.config import EngineConfig
from jaxllm.families.presets import PRESETS, hf_config
from jaxllm.families.tensor_names import named
from jaxllm.weights.abstract import AbstractModel
from jaxllm.weights.loader import load_parameters, random_parameters
from jaxllm.weights.orbax import is_orbax, restore_parameters

_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model's name led to.

    Attributes:
        hf_config: the configuration, in Hugging Face's spelling.
        path: its files; None for a preset, which has none.
        checkpoint: None where the parameters are random numbers.
        seed: of these.
    """

    hf_config: dict[str, Any]
    path: Path | None
    checkpoint: Checkpoint | None
    seed: int = 0

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's own sampling defaults and ends of answers."""
        return self.checkpoint.generation_config if self.checkpoint else {}

    def parameters(self, model: AbstractModel) -> Any:
        """Every parameter, as the model keeps it. Raises ValueError naming what does not fit."""
        if self.checkpoint is None:
            return random_parameters(model, self.seed)
        if is_orbax(self.checkpoint.path):
            return restore_parameters(model, self.checkpoint.path)
        return load_parameters(model, self.checkpoint)


def open_source(config: EngineConfig, *, progress: bool = True) -> ModelSource:
    """Find what `model` names, fetching it where it is a name of the hub. Raises ValueError that says what to do."""
    is_preset = config.model in PRESETS and not os.path.exists(config.model)
    if config.load_format == "dummy":
        path = None if config.model in PRESETS else resolve_model(config.model, progress=progress)
        return ModelSource(hf_config(config.model), path, None, config.seed)
    if is_preset:
        raise ValueError(
            f"{config.model!r} is a configuration without weights; pass a folder, a .gguf file or a Hugging Face id, "
            "or load_format='dummy' (--load-format dummy) for random weights"
        )
    path = resolve_model(config.model, progress=progress)
    checkpoint = named(open_checkpoint(path))
    return ModelSource(checkpoint.config, path, checkpoint)


def files_of(config: EngineConfig) -> Checkpoint | None:
    """The files of what `model` names, which say how its matrices are kept; None for a preset or random weights."""
    is_preset = config.model in PRESETS and not os.path.exists(config.model)
    return None if is_preset or config.load_format == "dummy" else named(open_checkpoint(resolve_model(config.model)))


def content_identity(config: EngineConfig, hf: dict, path: Path | None, longest: int | None = None) -> str:
    """Like `model_identity`, and the same on every machine that has these files: by names, sizes, first and last MiB.

    All of a large checkpoint would take minutes to read.
    """
    seed = config.seed if config.load_format == "dummy" else None
    facts = (hf, seed, config.dtype, config.quantization, longest)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for file in sorted([] if path is None else model_files(path)):
        digest.update(f"{file.name} {(size := file.stat().st_size)}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE_BYTES))
            content.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(content.read())
    return digest.hexdigest()


def model_identity(config: EngineConfig, hf: dict, path: Path | None, longest: int | None = None) -> str:
    """What decides the keys and values of given tokens: configuration, weights (by their files) and dtypes.

    `longest` is `max_model_len` where rotary embeddings depend on it. The sharding does not matter: what one mesh has
    cached, another may read.
    """
    files = [] if path is None else model_files(path)
    stats = [(str(f.relative_to(path.parent)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files if path]
    seed = config.seed if config.load_format == "dummy" else None
    facts = (
        hf,
        stats,
        seed,
        config.dtype,
        config.kv_dtype,
        config.quantization,
        *([] if longest is None else [longest]),
    )
    name = config.model if path is None else path.name
    return f"{name} {hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]}"
