"""What formats ask of a layer: its tensors with their shapes and dtypes, and fields of the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxllm.checkpoints.base import Checkpoint, CheckpointError, TensorInfo


def modules_with(tensors: Iterable[str], suffix: str) -> list[str]:
    """Modules that have a tensor of this name: `model.layers.0.self_attn.q_proj` for `.qweight`."""
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def need(checkpoint: Checkpoint, layer: str, name: str, dtypes: Sequence[str] = ()) -> TensorInfo:
    """A tensor of a layer. Raises CheckpointError where it is missing or of another dtype."""
    full = f"{layer}.{name}"
    info = checkpoint.tensors.get(full)
    if info is None:
        raise CheckpointError(f"layer {layer} has no tensor {full}; a quantised layer cannot be read without it")
    if dtypes and info.dtype not in dtypes:
        raise CheckpointError(f"layer {layer}: tensor {full} has dtype {info.dtype}; expected {' or '.join(dtypes)}")
    return info


def check_shape(layer: str, name: str, info: TensorInfo, *shapes: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor has one of these shapes."""
    if tuple(info.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise CheckpointError(f"layer {layer}: tensor {layer}.{name} has shape {list(info.shape)}; expected {expected}")


def check_group(layer: str, inputs: int, group: int) -> None:
    """Raise CheckpointError unless groups divide the inputs."""
    if group < 2 or group % 2 or inputs % group:
        raise CheckpointError(f"layer {layer}: its {inputs} inputs do not divide into groups of {group}")


def only(config: Mapping[str, Any], where: str, key: str, *values: Any) -> Any:
    """The value of a field (the first of `values` where it is missing). Raises CheckpointError for any other."""
    value = config.get(key, values[0])
    if value is None and None not in values:
        value = values[0]
    if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values):
        raise CheckpointError(
            f"{where} has {key}={value!r}, which is not supported; supported are {', '.join(map(repr, values))}"
        )
    return value


def known(config: Mapping[str, Any], where: str, *keys: str) -> None:
    """Refuse fields whose meaning is not known."""
    if unknown := sorted(str(key) for key, value in config.items() if key not in keys and value not in (None, {}, [])):
        raise CheckpointError(f"{where} has an unknown field {unknown[0]}={config[unknown[0]]!r}")


def matches(layer: str, patterns: Iterable[str], *, whole: bool = True) -> bool:
    """Whether a layer is named: by its name, by `re:` and an expression, or (not `whole`) by a part of its name."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], layer):
                return True
        elif layer == pattern or (not whole and f".{pattern}." in f".{layer}."):
            return True
    return False


def names(config: Mapping[str, Any], *keys: str) -> list[str]:
    """A list of layers, under whichever of these keys it stands."""
    found: list[str] = []
    for key in keys:
        value = config.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"quantization_config has {key}={value!r}; a list of layer names is required")
        for name in value:
            try:
                re.compile(name.removeprefix("re:"))
            except re.error as error:
                raise CheckpointError(f"quantization_config: {key} has {name!r}: {error}") from None
        found += value
    return found
