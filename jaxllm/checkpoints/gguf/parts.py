"""A GGUF model in one file or split into several: path -> its parts, mapped, and all their tensors by name.

Parts are called `NAME-00001-of-00003.gguf`; the first one holds the metadata. Knows nothing of architectures.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.file import GGUFHeader, GGUFTensor, read_header
from jaxllm.checkpoints.gguf.names import PART, part_files, part_name
from jaxllm.checkpoints.mapped import map_file


@dataclass(frozen=True, slots=True)
class GGUFPart:
    """One file: its header, its bytes and the mapping behind them."""

    header: GGUFHeader
    data: np.ndarray
    mapping: mmap.mmap


@dataclass(frozen=True, slots=True)
class GGUFParts:
    """All files of a model: the metadata, and every tensor with the part that holds it."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[GGUFTensor, GGUFPart]]


def open_parts(path: Path) -> GGUFParts:
    """Read and check every header and map every file.

    Raises:
        CheckpointError: A file is damaged or missing, or the parts do not belong together.
    """
    first = read_header(path)
    files = _files(path, first)
    headers = [first, *(read_header(file) for file in files[1:])]
    tensors: dict[str, tuple[GGUFTensor, GGUFPart]] = {}
    for i, (file, header) in enumerate(zip(files, headers, strict=True)):
        if len(files) > 1 and (_number(header, "no"), _number(header, "count")) != (i, len(files)):
            raise CheckpointError(f"{file}: says it is another part of another model; fetch the parts again")
        part = GGUFPart(header, *map_file(file))
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{file}: has the tensor {name!r} that an earlier part has too")
            tensors[name] = (tensor, part)
    expected = _number(first, "tensors.count")
    if len(files) > 1 and expected not in (None, len(tensors)):
        raise CheckpointError(f"{path}: says the parts have {expected} tensors, they have {len(tensors)}")
    return GGUFParts(first.metadata, tensors)


def _files(path: Path, first: GGUFHeader) -> list[Path]:
    count = _number(first, "count") or 1
    if count == 1:
        return [path]
    match = PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts but is not called NAME-00001-of-{count:05}.gguf; give the parts "
            "their names back, or merge them (llama-gguf-split --merge)"
        )
    if int(match["number"]) != 1 or _number(first, "no") != 0:
        raise CheckpointError(f"{path}: is not the first part; name {part_name(match, 1)}")
    files = part_files(path)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: this part of {count} is missing; fetch it into the same folder")
    return files


def _number(header: GGUFHeader, key: str) -> int | None:
    value = header.metadata.get(f"split.{key}")
    return value if type(value) is int else None
