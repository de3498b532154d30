"""Models on disk: a name becomes a path (`resolve_model`), a path becomes a `Checkpoint` (`open_checkpoint`).

Whatever the file format, what comes out is shaped like a Hugging Face checkpoint: its config keys, its tensor
names, its row order. Knows nothing of JAX, meshes or the decoder, and imports NumPy only once a file is
opened, so that a command line which only needs names starts quickly.
"""

from __future__ import annotations

from pathlib import Path

from jaxllm.checkpoints.base import Checkpoint, CheckpointError, TensorInfo
from jaxllm.checkpoints.download import pull
from jaxllm.checkpoints.gguf.names import is_gguf, part_files
from jaxllm.checkpoints.registry import DEFAULT_MODEL, MODELS, cache_home
from jaxllm.checkpoints.resolve import resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "MODELS",
    "Checkpoint",
    "CheckpointError",
    "TensorInfo",
    "cache_home",
    "model_files",
    "open_checkpoint",
    "pull",
    "resolve_model",
]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a `.gguf` file; headers are checked here, tensors are read on demand.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        from jaxllm.checkpoints.quantized.checkpoint import with_quantization
        from jaxllm.checkpoints.safetensors_folder import SafetensorsCheckpoint

        return with_quantization(SafetensorsCheckpoint.open(path))
    if is_gguf(path):
        from jaxllm.checkpoints.gguf.checkpoint import GGUFCheckpoint

        return GGUFCheckpoint.open(path)
    raise CheckpointError(f"{path}: not a checkpoint; pass a Hugging Face folder or a .gguf file")


def model_files(path: Path) -> list[Path]:
    """All files of the model at `path`: what a folder holds, or a `.gguf` file with the other parts of a split one."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in part_files(path) if file.is_file()]
