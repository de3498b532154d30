"""mxfp4 experts (gpt-oss): `*_blocks [E, N, K/32, 16]` of two e2m1 codes a byte, `*_scales [E, N, K/32]` in e8m0.

`w = e2m1[code] * 2^(scale - 127)`, the low half of a byte first (OCP Microscaling Formats 1.0).

Dimension letters: E experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.checkpoints.base import Checkpoint, CheckpointError
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.layers import check_shape, known, modules_with, names
from jaxllm.checkpoints.quantized.linear import Files
from jaxllm.config.quantization import E2M1, Scheme

if TYPE_CHECKING:
    from jaxllm.checkpoints.quantized.tensor import Index

_GROUP = 32
_SCHEME = Scheme(codes="uint4", group=_GROUP, table=E2M1, scale_dtype="float8_e8m0fnu")
_NOT_A_NUMBER = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """All experts' matrices, `[E, K, N]` as the model has them."""

    files: Files
    shape: tuple[int, int, int]
    name: str
    scheme: Scheme = _SCHEME
    axis: int = 1

    def codes(self, index: Index) -> np.ndarray:
        experts, inputs, outputs = (slice(*p.indices(n)[:2]) for p, n in zip(index, self.shape, strict=True))
        groups = slice(inputs.start // _GROUP, -(-inputs.stop // _GROUP))
        pairs = self.files.read(f"{self.name}_blocks", (experts, outputs, groups, slice(None)))
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:2], -1)
        first = inputs.start - groups.start * _GROUP
        return codes[:, :, first : first + inputs.stop - inputs.start].swapaxes(1, 2)

    def scales(self, index: Index) -> np.ndarray:
        experts, groups, outputs = index
        exponents = self.files.read(f"{self.name}_scales", (experts, outputs, groups)).swapaxes(1, 2)
        if (exponents == _NOT_A_NUMBER).any():
            raise CheckpointError(f"tensor {self.name}_scales has values that are no numbers: the file is damaged")
        return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)

    def minima(self, index: Index) -> np.ndarray:
        raise AssertionError("there are none")

    def order(self) -> np.ndarray:
        raise AssertionError("inputs are in their order")

    def input_scale(self) -> float:
        raise AssertionError("activations stay as they are")

    def release(self) -> None:
        self.files.release(f"{self.name}_blocks")


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    known(config, "quantization_config", "quant_method", "modules_to_not_convert", "dequantize")
    names(config, "modules_to_not_convert")
    tensors, used = {}, set()
    for name in modules_with(checkpoint.tensors, "_blocks"):
        blocks, scales = (checkpoint.tensors.get(f"{name}_{kind}") for kind in ("blocks", "scales"))
        if blocks is None or scales is None:
            raise CheckpointError(f"layer {name} has no tensor {name}_scales; its blocks cannot be read without it")
        if len(blocks.shape) != 4 or blocks.shape[-1] != _GROUP // 2 or blocks.dtype != "uint8":
            raise CheckpointError(
                f"layer {name}: tensor {name}_blocks is {blocks.dtype} {list(blocks.shape)}; expected uint8 [.., 16]"
            )
        check_shape(f"{name}_scales".rpartition(".")[0], f"{name}_scales".rpartition(".")[2], scales, blocks.shape[:3])
        if scales.dtype not in ("uint8", "float8_e8m0fnu"):
            raise CheckpointError(f"layer {name}: tensor {name}_scales has dtype {scales.dtype}; expected uint8")
        experts, outputs, groups, _ = blocks.shape
        files = Files(read=_bytes_of(checkpoint), release=checkpoint.release)
        tensors[name] = Blocks(files=files, shape=(experts, groups * _GROUP, outputs), name=name)
        used |= {f"{name}_blocks", f"{name}_scales"}
    if not tensors:
        raise CheckpointError("quantization_config says mxfp4, but no tensor ends in _blocks")
    return Linears(tensors, frozenset(used))


def _bytes_of(checkpoint: Checkpoint) -> Any:
    return lambda name, index: checkpoint.read(name, index).view(np.uint8)
