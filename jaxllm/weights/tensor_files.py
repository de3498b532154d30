"""Parameters as the files of a Hugging Face folder: taken apart into tensors, in safetensors files of bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.families.sources import WeightMap

_FILE_BYTES = 4 << 30


def taken_apart(values: Mapping[Any, Any], sources: WeightMap) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor that parameters (arrays by path) were made of, by its Hugging Face name; some values at a time."""
    import numpy as np

    unfinished: dict[str, tuple[np.ndarray, int]] = {}
    shared = [part.name for source in sources.values() for part in source.parts]
    for path, source in sources.items():
        value = np.asarray(values[path])
        if source.offset:
            value = (value.astype(np.float32) - source.offset).astype(value.dtype)
        for part in source.parts:
            tensor, written = unfinished.get(part.name) or (np.empty(part.shape, value.dtype), 0)
            part.write(value, tensor)
            unfinished[part.name] = (tensor, written + 1)
            if written + 1 == shared.count(part.name):
                yield part.name, unfinished.pop(part.name)[0]


def write_tensors(tensors: Iterable[tuple[str, np.ndarray]], folder: Path) -> None:
    """Write `model.safetensors`, or several files with an index. Raises OSError where it cannot."""
    files: list[tuple[Path, list[str], int]] = []
    for batch in _batches(tensors):
        file = folder / f"part-{len(files)}.safetensors"
        files.append((file, list(batch), _save(batch, file)))
    weight_map = {}
    for i, (file, names, _) in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
        file.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size for *_, size in files)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _batches(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    batch: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > _FILE_BYTES:
            yield batch
            batch = {}
        batch[name] = tensor
    yield batch


def _save(tensors: dict[str, np.ndarray], file: Path) -> int:
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file, {"format": "pt"})
    except SafetensorError as error:  # of the library, whatever the file system said
        raise OSError(str(error)) from error
    return sum(tensor.nbytes for tensor in tensors.values())
