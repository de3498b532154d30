"""A checkpoint whose `quantization_config` is understood: linears by the names and shapes of their values.

Checkpoint -> Checkpoint. What the configuration says of a layer and what the layer's tensors are must agree; where
they do not, or where a method is not known, the layer is refused by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxllm.checkpoints.base import Checkpoint, CheckpointError, TensorInfo
from jaxllm.checkpoints.quantized.tensor import QuantizedTensor, dequantized

if TYPE_CHECKING:
    import numpy as np

KEY = "quantization_config"
# Method -> the module beside this one that reads it.
METHODS = {
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "awq": "awq",
    "gptq": "gptq",
    "mxfp4": "mxfp4",
}


class Format(Protocol):
    """A module that reads one method."""

    def linears(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
        """Every quantised tensor by the name of its values."""
        ...


@dataclass(frozen=True, slots=True)
class Linears:
    """What a method found: the quantised tensors, and the names of the file's tensors that they are made of."""

    tensors: Mapping[str, QuantizedTensor]
    used: frozenset[str]


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """See `Checkpoint`; a quantised tensor reads as its float32 values."""

    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    quantized: Mapping[str, QuantizedTensor]
    method: str
    inner: Checkpoint

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.inner.generation_config

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if (tensor := self.quantized.get(name)) is None:
            return self.inner.read(name, index)
        return dequantized(tensor, index or (slice(None),) * len(tensor.shape))

    def release(self, name: str) -> None:
        if (tensor := self.quantized.get(name)) is None:
            self.inner.release(name)
        else:
            tensor.release()


def with_quantization(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its quantised layers understood; itself where it has none.

    Raises:
        CheckpointError: naming the method or the layer that is not supported or does not fit the configuration.
    """
    holder, config = _config(checkpoint.config)
    if config is None or not checkpoint.tensors:
        return checkpoint
    method = str(config.get("quant_method", "")).lower()
    if method not in METHODS:
        raise CheckpointError(
            f"{checkpoint.path}: quantization_config has quant_method={config.get('quant_method')!r}, which is not "
            f"supported; supported are {', '.join(METHODS)} and GGUF files"
        )
    module: Format = importlib.import_module(f"jaxllm.checkpoints.quantized.{METHODS[method]}")  # type: ignore[assignment]
    try:
        found = module.linears(config, checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # of another type than anybody writes
        raise CheckpointError(
            f"{checkpoint.path}: quantization_config cannot be understood ({type(error).__name__}: {error})"
        ) from None
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in found.used}
    tensors |= {name: TensorInfo(tensor.shape, "float32") for name, tensor in found.tensors.items()}
    return QuantizedCheckpoint(_without(checkpoint.config, holder), tensors, found.tensors, method, checkpoint)


def _config(hf: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any] | None]:
    """The object, and under which key of the configuration it lies (None: at the top)."""
    if isinstance(hf.get(KEY), Mapping):
        return None, hf[KEY]
    for key in ("text_config", "llm_config"):
        nested = hf.get(key)
        if isinstance(nested, Mapping) and isinstance(nested.get(KEY), Mapping):
            return key, nested[KEY]
    return None, None


def _without(hf: Mapping[str, Any], holder: str | None) -> dict[str, Any]:
    """The configuration of the same model, as if it had never been quantised."""
    if holder is None:
        return {key: value for key, value in hf.items() if key != KEY}
    return {**hf, holder: _without(hf[holder], None)}
