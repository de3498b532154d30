"""A Hugging Face folder (config.json and one or more `.safetensors` files) as a `Checkpoint`.

Input: the folder. Output: config, tensor table, arrays read as views of the mapped files. Pickle is refused.
Knows nothing of the layout of a single file (safetensors_file.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import PICKLE_SUFFIXES, CheckpointError, TensorInfo, refuse_pickle
from jaxllm.checkpoints.safetensors_file import SafetensorsFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class SafetensorsCheckpoint:
    """See `Checkpoint`."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    _files: Mapping[str, SafetensorsFile]  # by tensor name

    @classmethod
    def open(cls, path: Path) -> SafetensorsCheckpoint:
        """Read the configs and check and map every weight file.

        Raises:
            CheckpointError: A file is missing, damaged or contradicts the index.
        """
        config = folder_config(path)
        generation = path / "generation_config.json"
        files = _weight_files(path)
        return cls(
            path=path,
            config=config,
            generation_config=_json_object(generation) if generation.is_file() else {},
            tensors={name: file.tensors[name] for name, file in files.items()},
            _files=files,
        )

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._files[name].read(name, index)

    def release(self, name: str) -> None:
        self._files[name].release(name)


def folder_config(path: Path) -> dict[str, Any]:
    """What the folder's `config.json` says. Raises CheckpointError."""
    return _json_object(path / "config.json")


def _weight_files(folder: Path) -> dict[str, SafetensorsFile]:
    if (folder / _SINGLE).is_file():
        file = SafetensorsFile.open(folder / _SINGLE)
        return dict.fromkeys(file.tensors, file)
    if (folder / _INDEX).is_file():
        return _sharded(folder)
    if (folder / "parameters").is_dir():  # Orbax: jaxllm.weights.orbax reads it, there is no tensor here
        return {}
    if any(file.suffix in PICKLE_SUFFIXES for file in folder.iterdir()):
        raise refuse_pickle(folder)
    raise CheckpointError(f"{folder}: has neither {_SINGLE} nor {_INDEX}")


def _sharded(folder: Path) -> dict[str, SafetensorsFile]:
    index = folder / _INDEX
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: expected a 'weight_map' from tensor names to file names")
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        # A plain name: an index must not make us read outside its own folder.
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {shard!r}; expected .safetensors files in the same folder")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{index}: names {shard!r}, which is not there; fetch the missing file")
        shards[shard] = SafetensorsFile.open(folder / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise CheckpointError(f"{index}: says tensor {name!r} is in {shard!r}, but it is not")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return value
