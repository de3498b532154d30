"""`quant_method: fp8`: e4m3 weights with a scale for each block (DeepSeek-V3, Qwen3-FP8), or one for all.

`weight_scale_inv` (`weight_scale` without blocks) is what codes are multiplied by. Activations stay in 16 bits where
the file asks for dynamic ones, which loses nothing; a static scale of the file is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.base import Checkpoint, CheckpointError
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.compressed_tensors import block_of, check_rank, group_of_block
from jaxllm.checkpoints.quantized.layers import check_shape, known, matches, names, need, only
from jaxllm.checkpoints.quantized.linear import Files, RowsOfCodes
from jaxllm.config.quantization import Activations, Scheme

_FP8 = "float8_e4m3fn"
_FLOATS = ("float32", "bfloat16", "float16")
_WHERE = "quantization_config"


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    known(
        config,
        _WHERE,
        "quant_method",
        "fmt",
        "weight_block_size",
        "activation_scheme",
        "modules_to_not_convert",
        "ignored_layers",
        "scale_fmt",
        "dequantize",
        "kv_cache_scheme",
    )
    only(config, _WHERE, "fmt", "e4m3", "float8_e4m3fn")
    is_static = only(config, _WHERE, "activation_scheme", "dynamic", "static") == "static"
    block = None if config.get("weight_block_size") is None else block_of(_WHERE, config["weight_block_size"])
    left_out = names(config, "modules_to_not_convert", "ignored_layers")
    tensors, used = {}, set()
    for name, info in checkpoint.tensors.items():
        layer = name.removesuffix(".weight")
        if info.dtype != _FP8:
            continue
        if layer == name or len(info.shape) != 2:
            raise CheckpointError(f"tensor {name} is fp8 but no linear's weight; it is not supported")
        if matches(layer, left_out, whole=False):
            raise CheckpointError(f"layer {layer} is fp8, but the configuration lists it as not converted")
        tensors[name] = _linear(layer, info.shape, block, is_static, checkpoint)
        used |= {f"{layer}.{suffix}" for suffix in ("weight", "weight_scale_inv", "weight_scale", "input_scale")}
    if not tensors:
        raise CheckpointError("quantization_config says fp8, but no tensor of the checkpoint is")
    return Linears(tensors, frozenset(used))


def _linear(
    layer: str, shape: tuple[int, ...], block: tuple[int, int] | None, is_static: bool, checkpoint: Checkpoint
) -> RowsOfCodes:
    rows, columns = shape
    suffix = "weight_scale_inv" if block or f"{layer}.weight_scale" not in checkpoint.tensors else "weight_scale"
    info = need(checkpoint, layer, suffix, _FLOATS)
    group = 0
    if block is None:
        check_shape(layer, suffix, info, (), (1,), (rows, 1), (rows,))
    else:
        check_rank(layer, suffix, info)
        check_shape(layer, suffix, info, (-(-rows // block[0]), -(-columns // block[1])))
        group = group_of_block(layer, columns, block[1])
    if is_static:
        check_shape(layer, "input_scale", need(checkpoint, layer, "input_scale", _FLOATS), (), (1,))
    activations = Activations(codes=_FP8, is_static=True) if is_static else None
    return RowsOfCodes(
        files=Files(read=checkpoint.read, release=checkpoint.release),
        shape=(rows, columns),
        scheme=Scheme(codes=_FP8, group=group, scale_dtype=info.dtype, activations=activations),
        codes_name=f"{layer}.weight",
        scales_name=f"{layer}.{suffix}",
        scale_shape=info.shape,
        block=block or (1, 0),
        input_scale_name=f"{layer}.input_scale" if is_static else None,
    )
