"""compressed-tensors (llm-compressor): `int-quantized`, `float-quantized` and `pack-quantized` linears.

Groups of the configuration name layers (`targets`) and say how their weights are kept; `ignore` leaves layers out.
Source: the library of that name, its `quantization_config` and the layout of its packed integers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.base import Checkpoint, CheckpointError, TensorInfo
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.layers import check_group, check_shape, known, matches, names, need, only
from jaxllm.checkpoints.quantized.linear import Files, RowsOfCodes
from jaxllm.config.quantization import Activations, Scheme

_FLOATS = ("bfloat16", "float16", "float32")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
_CACHE = re.compile(r".*\.self_attn\.(?:[qkv]_scale|[qkv]_zero_point|(?:k|v)_proj\.output_scale)")


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    known(
        config,
        "quantization_config",
        "quant_method",
        "config_groups",
        "format",
        "ignore",
        "kv_cache_scheme",
        "quantization_status",
        "global_compression_ratio",
        "version",
        "sparsity_config",
        "transform_config",
        "run_compressed",
    )
    only(config, "quantization_config", "quantization_status", "compressed", "frozen")
    if config.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise CheckpointError("quantization_config has a sparsity_config, which is not supported")
    ignored, groups = names(config, "ignore"), config.get("config_groups") or {}
    described = _quantized_layers(checkpoint)
    tensors, used = {}, {name for name in checkpoint.tensors if _CACHE.fullmatch(name)}
    for layer in described | _linears(checkpoint):
        if matches(layer, ignored) or (chosen := _group_of(layer, groups, layer in described)) is None:
            continue  # its scales, if it has any, are refused by the loader: nobody uses them
        name, group = chosen
        tensors[f"{layer}.weight"] = _linear(layer, f"config group {name}", group, config.get("format"), checkpoint)
        used |= {f"{layer}.{suffix}" for suffix in _SUFFIXES}
    return Linears(tensors, frozenset(used))


def _quantized_layers(checkpoint: Checkpoint) -> set[str]:
    return {
        name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith((".weight_scale", ".weight_packed"))
    }


def _linears(checkpoint: Checkpoint) -> set[str]:
    """Modules that could be linears: a matrix that is no table of embeddings."""
    return {
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not name.endswith("embed_tokens.weight")
    }


def _group_of(layer: str, groups: Mapping[str, Any], is_quantized: bool) -> tuple[str, Mapping[str, Any]] | None:
    """The group that names the layer; the class `Linear` names all, but gives way to a name."""
    general = None
    for name, group in groups.items():
        targets = names(group, "targets")
        if matches(layer, targets):
            return name, group
        if "Linear" in targets:
            general = general or (name, group)
    if general is None and is_quantized:
        raise CheckpointError(f"layer {layer} has quantised tensors but no config group has it among its targets")
    return general


def _linear(
    layer: str, where: str, group: Mapping[str, Any], format_: str | None, checkpoint: Checkpoint
) -> RowsOfCodes:
    known(group, where, "targets", "weights", "input_activations", "output_activations", "format")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} has weights={weights!r}; layer {layer} needs them described")
    if group.get("output_activations"):
        raise CheckpointError(f"{where} has output_activations, which are not supported (layer {layer})")
    kind = group.get("format") or format_ or "pack-quantized"
    if kind not in _FORMATS:
        raise CheckpointError(f"layer {layer}: format {kind!r} is not supported; supported are {', '.join(_FORMATS)}")
    bits = only(weights, where, "num_bits", 8, 4)
    is_float = only(weights, where, "type", "int", "float") == "float"
    only(weights, where, "dynamic", False)
    is_packed = kind == "pack-quantized"
    if (is_float, bits, is_packed) not in ((False, 8, False), (False, 4, True), (False, 8, True), (True, 8, False)):
        number = "float" if is_float else "int"
        raise CheckpointError(f"layer {layer}: format {kind!r} with {bits}-bit {number} weights is not supported")
    shape = _shape(layer, checkpoint, is_packed, bits, is_float)
    return _described(layer, where, weights, group.get("input_activations"), shape, bits, is_packed, checkpoint)


def _shape(layer: str, checkpoint: Checkpoint, is_packed: bool, bits: int, is_float: bool) -> tuple[int, int]:
    if not is_packed:
        info = need(checkpoint, layer, "weight", ("float8_e4m3fn",) if is_float else ("int8",))
        check_rank(layer, "weight", info)
        return info.shape[0], info.shape[1]
    info = need(checkpoint, layer, "weight_packed", ("int32",))
    check_rank(layer, "weight_packed", info)
    check_shape(layer, "weight_shape", need(checkpoint, layer, "weight_shape"), (2,))
    rows, columns = map(int, checkpoint.read(f"{layer}.weight_shape"))
    per_word = 32 // bits
    if info.shape != (rows, -(-columns // per_word)):
        raise CheckpointError(
            f"layer {layer}: weight_shape says {rows} x {columns}, but weight_packed has shape {list(info.shape)}"
        )
    return rows, columns


def check_rank(layer: str, name: str, info: TensorInfo) -> None:
    """Raise CheckpointError unless the tensor is a matrix."""
    if len(info.shape) != 2:
        raise CheckpointError(f"layer {layer}: tensor {layer}.{name} has shape {list(info.shape)}; expected a matrix")


def _described(
    layer: str,
    where: str,
    weights: Mapping[str, Any],
    activations: Any,
    shape: tuple[int, int],
    bits: int,
    is_packed: bool,
    checkpoint: Checkpoint,
) -> RowsOfCodes:
    """The linear, its scales checked against its strategy."""
    rows, columns = shape
    info = need(checkpoint, layer, "weight_scale", _FLOATS)
    strategy = only(weights, where, "strategy", "tensor", "channel", "group", "block")
    group, tall, wide = 0, 1, 0
    if strategy == "tensor":
        check_shape(layer, "weight_scale", info, (1,), (), (1, 1))
    elif strategy == "channel":
        check_shape(layer, "weight_scale", info, (rows, 1), (rows,))
    elif strategy == "group":
        group = weights.get("group_size") or 0
        check_group(layer, columns, group)
        check_shape(layer, "weight_scale", info, (rows, columns // group))
        wide = group
    else:
        tall, wide = block_of(where, weights.get("block_structure"))
        group = group_of_block(layer, columns, wide)
        check_shape(layer, "weight_scale", info, (-(-rows // tall), -(-columns // wide)))
    is_symmetric = only(weights, where, "symmetric", True, False)
    zeros, zero_bits = None, 0
    if not is_symmetric:
        zeros, zero_bits = _zeros(layer, info.shape, rows, bits if is_packed else 0, checkpoint)
    order = _order(layer, weights, columns, strategy, checkpoint)
    codes = "uint4" if bits == 4 else "int8" if weights.get("type", "int") == "int" else "float8_e4m3fn"
    scheme = Scheme(
        codes=codes,
        group=group,
        scale_dtype=info.dtype if is_symmetric else "float32",
        offset=8 if bits == 4 and is_symmetric else 0,
        has_minima=not is_symmetric,
        is_permuted=order is not None,
        activations=_activations(layer, activations, checkpoint),
    )
    is_static = scheme.activations is not None and scheme.activations.is_static
    return RowsOfCodes(
        files=Files(read=checkpoint.read, release=checkpoint.release),
        shape=shape,
        scheme=scheme,
        codes_name=f"{layer}.weight_packed" if is_packed else f"{layer}.weight",
        scales_name=f"{layer}.weight_scale",
        zeros_name=zeros,
        order_name=order,
        input_scale_name=f"{layer}.input_scale" if is_static else None,
        packed_bits=bits if is_packed else 0,
        scale_shape=_scale_shape(info),
        block=(tall, wide),
        zero_bits=zero_bits,
    )


def _scale_shape(info: TensorInfo) -> tuple[int, ...]:
    return () if info.shape == (1, 1) else info.shape


def block_of(where: str, block: Any) -> tuple[int, int]:
    """`[128, 128]`: outputs and inputs that share a scale."""
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(f"{where} has blocks of {block!r}; two positive numbers are required")
    return block[0], block[1]


def group_of_block(layer: str, columns: int, wide: int) -> int:
    """Inputs that share a scale here: a whole block, or a part of one that divides the inputs."""
    import math

    group = math.gcd(columns, wide)
    if group < 8:
        raise CheckpointError(f"layer {layer}: blocks of {wide} do not fit its {columns} inputs")
    return group


def _zeros(layer: str, scales: tuple[int, ...], rows: int, packed_bits: int, checkpoint: Checkpoint) -> tuple[str, int]:
    info = need(checkpoint, layer, "weight_zero_point", ("int8", "int32", "uint8"))
    if packed_bits and info.dtype == "int32":
        columns = scales[1] if len(scales) == 2 else 1
        check_shape(layer, "weight_zero_point", info, (-(-rows * packed_bits // 32), columns))
        return f"{layer}.weight_zero_point", packed_bits
    check_shape(layer, "weight_zero_point", info, scales)
    return f"{layer}.weight_zero_point", 0


def _order(layer: str, weights: Mapping[str, Any], columns: int, strategy: str, checkpoint: Checkpoint) -> str | None:
    ordering = weights.get("actorder")
    if ordering not in (None, False, True, "group", "weight", "static", "dynamic"):
        raise CheckpointError(f"layer {layer}: actorder={ordering!r} is not supported")
    if f"{layer}.weight_g_idx" not in checkpoint.tensors:
        if ordering in (True, "group", "dynamic"):
            need(checkpoint, layer, "weight_g_idx")
        return None
    if strategy != "group":
        raise CheckpointError(f"layer {layer}: weight_g_idx with strategy {strategy!r} is not supported")
    check_shape(layer, "weight_g_idx", need(checkpoint, layer, "weight_g_idx", ("int32", "int64")), (columns,))
    return f"{layer}.weight_g_idx"


def _activations(layer: str, asked: Any, checkpoint: Checkpoint) -> Activations | None:
    if not asked:
        return None
    where = f"layer {layer}: input_activations"
    only(asked, where, "num_bits", 8)
    only(asked, where, "symmetric", True)
    codes = "int8" if only(asked, where, "type", "int", "float") == "int" else "float8_e4m3fn"
    if only(asked, where, "dynamic", False, True):
        only(asked, where, "strategy", "token", "tensor")
        return Activations(codes=codes)
    only(asked, where, "strategy", "tensor")
    check_shape(layer, "input_scale", need(checkpoint, layer, "input_scale", _FLOATS), (1,), ())
    return Activations(codes=codes, is_static=True)
