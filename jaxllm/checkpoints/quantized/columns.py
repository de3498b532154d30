"""What AWQ and GPTQ share: layers with `qweight`, `qzeros` and `scales`, column by column."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.checkpoints.base import Checkpoint, CheckpointError
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.layers import check_group, check_shape, matches, modules_with, names, need
from jaxllm.checkpoints.quantized.linear import ColumnsOfCodes, Files
from jaxllm.config.quantization import Scheme

_SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the configuration says of one layer.

    Attributes:
        group: inputs that share a scale; -1: all.
        is_symmetric: whether zeros are the middle of the codes.
        is_permuted: whether inputs may be in an order of their own.
    """

    bits: int
    group: int
    is_symmetric: bool = False
    is_permuted: bool = False


def group_size(where: str, config: Mapping[str, Any]) -> int:
    """The field of that name. Raises CheckpointError where it is no number of inputs."""
    group = config.get("group_size", 128)
    if type(group) is not int or group == 0 or group < -1:
        raise CheckpointError(f"{where} has group_size={group!r}; expected a number of inputs, or -1")
    return group


def columns_of(
    config: Mapping[str, Any],
    checkpoint: Checkpoint,
    settings_of: Callable[[str], Settings | None],
    *,
    is_awq: bool,
    zero_shift: int = 0,
) -> Linears:
    """Every layer that has a `qweight`. Raises CheckpointError naming one whose tensors do not fit together.

    `settings_of(layer)` is None where the configuration leaves the layer out.
    """
    left_out = names(config, "modules_to_not_convert")
    tensors, used = {}, set()
    for layer in modules_with(checkpoint.tensors, ".qweight"):
        settings = settings_of(layer)
        if settings is None or matches(layer, left_out, whole=False):
            raise CheckpointError(f"layer {layer} has a qweight, but the configuration lists it as not converted")
        bits, is_permuted = settings.bits, settings.is_permuted
        shape = _shape(layer, checkpoint, bits, is_awq)
        own = shape[1] if settings.group == -1 else settings.group
        check_group(layer, shape[1], own)
        _check(layer, checkpoint, shape, own, bits)
        has_order = (
            not is_awq and f"{layer}.g_idx" in checkpoint.tensors and _is_permuted(layer, shape[1], own, checkpoint)
        )
        if has_order and not is_permuted:
            raise CheckpointError(f"layer {layer}: desc_act=false, but its g_idx is not in the order of the inputs")
        if is_permuted and not is_awq:
            need(checkpoint, layer, "g_idx")
        scheme = Scheme(
            codes="uint4" if bits == 4 else "int8",
            group=0 if own == shape[1] else own,
            scale_dtype=checkpoint.tensors[f"{layer}.scales"].dtype if settings.is_symmetric else "float32",
            offset=8 if settings.is_symmetric and bits == 4 else 0,
            has_minima=not settings.is_symmetric,
            is_permuted=has_order,
        )
        tensors[f"{layer}.weight"] = ColumnsOfCodes(
            files=Files(read=checkpoint.read, release=checkpoint.release),
            shape=shape,
            scheme=scheme,
            prefix=layer,
            bits=bits,
            is_awq=is_awq,
            zero_shift=zero_shift,
        )
        used |= {f"{layer}.{suffix}" for suffix in _SUFFIXES}
    if not tensors:
        raise CheckpointError(f"quantization_config says {config.get('quant_method')}, but no layer has a qweight")
    return Linears(tensors, frozenset(used))


def _shape(layer: str, checkpoint: Checkpoint, bits: int, is_awq: bool) -> tuple[int, int]:
    """`[N, K]`."""
    info = need(checkpoint, layer, "qweight", ("int32", "uint32"))
    if len(info.shape) != 2:
        raise CheckpointError(f"layer {layer}: tensor {layer}.qweight has shape {list(info.shape)}; expected a matrix")
    first, second = info.shape
    return (second * (32 // bits), first) if is_awq else (second, first * (32 // bits))


def _check(layer: str, checkpoint: Checkpoint, shape: tuple[int, int], group: int, bits: int) -> None:
    rows, columns = shape
    if rows % (32 // bits):
        raise CheckpointError(f"layer {layer}: {rows} outputs do not fill words of {32 // bits} zeros")
    check_shape(
        layer, "scales", need(checkpoint, layer, "scales", ("float16", "bfloat16", "float32")), (columns // group, rows)
    )
    check_shape(
        layer, "qzeros", need(checkpoint, layer, "qzeros", ("int32", "uint32")), (columns // group, rows * bits // 32)
    )


def _is_permuted(layer: str, columns: int, group: int, checkpoint: Checkpoint) -> bool:
    check_shape(layer, "g_idx", need(checkpoint, layer, "g_idx", ("int32", "int64")), (columns,))
    return bool((checkpoint.read(f"{layer}.g_idx") != np.arange(columns) // group).any())
