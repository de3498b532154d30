"""What a checkpoint looks like to the model loader, whatever the file format behind it.

Always Hugging Face shaped: its config keys, its tensor names, its row order. Knows nothing of how a
format is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: the file, what is wrong, what to do."""


def refuse_pickle(path: Path) -> CheckpointError:
    """The error for weights that only exist as pickle, which runs code when it is read."""
    return CheckpointError(
        f"{path}: pickle weights ({', '.join(PICKLE_SUFFIXES)}) are never loaded, they can run code; convert "
        "with transformers: AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst, "
        "safe_serialization=True)"
    )


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype that `Checkpoint.read` returns for a tensor.

    `dtype` is the word Hugging Face uses ("bfloat16", "float32", "float8_e4m3fn", ...); with `ml_dtypes`
    imported, `numpy.dtype` understands every one of them. Block-quantised tensors say "float32".
    """

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """Config and tensors of one model, read lazily."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]:
        """The keys of `config.json`; synthesised for formats that have no such file."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """The keys of `generation_config.json`, or an empty dict."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name, e.g. `model.layers.0.self_attn.q_proj.weight`."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A whole tensor, or the part `index` selects; a read-only memory-mapped view where possible."""
        ...

    def release(self, name: str) -> None:
        """The tensor will not be read again: its pages of the mapped file need not stay in memory."""
        ...
