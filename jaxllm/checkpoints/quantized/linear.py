"""The kinds of tensors that formats describe their linears with, as `QuantizedTensor`s over a checkpoint's reads.

Dimension letters: N outputs, K inputs, J groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.quantized.packing import AWQ_ORDER, covering, unpacked

if TYPE_CHECKING:
    from jaxllm.checkpoints.quantized.tensor import Index
    from jaxllm.config.quantization import Scheme

Read = Callable[[str, tuple[slice, ...] | None], np.ndarray]
Release = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The checkpoint's own tensors: how to read them and let go of them."""

    read: Read
    release: Release


def finite(name: str, values: np.ndarray) -> np.ndarray:
    """As float32. Raises CheckpointError naming the tensor where one is infinite or no number."""
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor {name} has values that are no finite numbers: the file is damaged")
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfCodes:
    """A linear `[N, K]` whose codes lie row by row: packed into words along K, or one in each element.

    Attributes:
        names: of the tensors that hold codes, scales, zeros (None: none), groups of inputs, input scales.
        packed_bits: of codes packed into 32-bit words; 0: they are not.
        block: how many neighbouring outputs share a scale, and inputs in the file's own blocks of scales.
        zero_bits: of zero points packed along N; 0: one in each element.
        signed: what is taken off packed codes to make int8 of them.
    """

    files: Files
    shape: tuple[int, ...]
    scheme: Scheme
    codes_name: str
    scales_name: str
    zeros_name: str | None = None
    order_name: str | None = None
    input_scale_name: str | None = None
    packed_bits: int = 0
    scale_shape: tuple[int, ...] = ()
    block: tuple[int, int] = (1, 0)
    zero_bits: int = 0
    axis: int = 1

    def codes(self, index: Index) -> np.ndarray:
        rows, inputs = index
        if self.scheme.is_permuted:
            return self._values(rows, slice(0, self.shape[1]))[:, self.order()[inputs]]
        return self._values(rows, inputs)

    def scales(self, index: Index) -> np.ndarray:
        return finite(self.scales_name, self._by_group(self.scales_name, index))

    def minima(self, index: Index) -> np.ndarray:
        """`-scale * zero` (and what makes 8-bit codes signed)."""
        rows, groups = index
        assert self.zeros_name is not None
        if self.zero_bits:
            words, cut = covering(slice(*rows.indices(self.shape[0])[:2]), 32 // self.zero_bits)
            zeros = unpacked(self.files.read(self.zeros_name, (words, groups)), self.zero_bits, 0)[cut]
            zeros = zeros.astype(np.float32) - (128 if self.zero_bits == 8 else 0)
        else:
            zeros = self._by_group(self.zeros_name, index).astype(np.float32)
            zeros = zeros + (8 if self.scheme.bits == 4 else 0)
        return -self.scales(index) * zeros

    def order(self) -> np.ndarray:
        assert self.order_name is not None
        groups = self.files.read(self.order_name, None)
        return sorted_inputs(self.order_name, groups, self.shape[1], self.scheme.group)

    def input_scale(self) -> float:
        assert self.input_scale_name is not None
        return float(finite(self.input_scale_name, self.files.read(self.input_scale_name, None)).max())

    def release(self) -> None:
        self.files.release(self.codes_name)

    def _values(self, rows: slice, inputs: slice) -> np.ndarray:
        if not self.packed_bits:
            codes = self.files.read(self.codes_name, (rows, inputs))
            if codes.dtype == np.int8 or codes.dtype == ml_dtypes.float8_e4m3fn:
                return codes
            raise CheckpointError(f"tensor {self.codes_name} has dtype {codes.dtype}")
        words, cut = covering(slice(*inputs.indices(self.shape[1])[:2]), 32 // self.packed_bits)
        codes = unpacked(self.files.read(self.codes_name, (rows, words)), self.packed_bits, 1)[:, cut]
        return codes if self.packed_bits == 4 else (codes ^ 128).view(np.int8)

    def _by_group(self, name: str, index: Index) -> np.ndarray:
        """Scales or zeros `[N, J]`, of whatever outputs and inputs share one in the file."""
        rows, groups = (slice(*part.indices(size)[:2]) for part, size in zip(index, self._groups, strict=True))
        if len(self.scale_shape) < 2:  # one for all, or one for each output
            values = self.files.read(name, None).reshape(-1)
            values = np.broadcast_to(values, (self.shape[0],)) if values.size == 1 else values
            return np.broadcast_to(values[rows, None], (rows.stop - rows.start, groups.stop - groups.start))
        tall, wide = self.block
        per_scale = wide // self.scheme.group if wide and self.scheme.group else 1
        outputs, inputs = np.arange(rows.start, rows.stop) // tall, np.arange(groups.start, groups.stop) // per_scale
        if tall == per_scale == 1:
            return self.files.read(name, (rows, groups))
        some = self.files.read(name, (slice(outputs[0], outputs[-1] + 1), slice(inputs[0], inputs[-1] + 1)))
        return some[np.ix_(outputs - outputs[0], inputs - inputs[0])]

    @property
    def _groups(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1] // self.scheme.group if self.scheme.group else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsOfCodes:
    """A linear as AWQ and GPTQ keep it: `[K, N]` with `scales` `[J, N]` and packed `qzeros`; here `[N, K]`.

    Attributes:
        prefix: of the tensors' names.
        is_awq: words lie along N in AWQ's order; otherwise along K, the lowest bits first.
        zero_shift: what GPTQ's first version takes off zeros before it stores them.
    """

    files: Files
    shape: tuple[int, ...]
    scheme: Scheme
    prefix: str
    bits: int
    is_awq: bool
    zero_shift: int = 0
    axis: int = 1

    def codes(self, index: Index) -> np.ndarray:
        rows, inputs = (slice(*part.indices(size)[:2]) for part, size in zip(index, self.shape, strict=True))
        per_word, name = 32 // self.bits, f"{self.prefix}.qweight"
        if self.is_awq:
            words, cut = covering(rows, per_word)
            codes = unpacked(self.files.read(name, (inputs, words)), self.bits, 1, AWQ_ORDER)[:, cut]
        elif self.scheme.is_permuted:
            codes = unpacked(self.files.read(name, (slice(None), rows)), self.bits, 0)[self.order()[inputs]]
        else:
            words, cut = covering(inputs, per_word)
            codes = unpacked(self.files.read(name, (words, rows)), self.bits, 0)[cut]
        codes = codes.T
        return codes if self.bits == 4 else (codes ^ 128).view(np.int8)

    def scales(self, index: Index) -> np.ndarray:
        rows, groups = index
        name = f"{self.prefix}.scales"
        if not self.scheme.has_minima:
            self._check_symmetric(index)
        return finite(name, self.files.read(name, (groups, rows))).T

    def minima(self, index: Index) -> np.ndarray:
        zeros = self._zeros(index).astype(np.float32) - (128 if self.bits == 8 else 0)
        return -self.scales(index) * zeros

    def order(self) -> np.ndarray:
        name = f"{self.prefix}.g_idx"
        return sorted_inputs(name, self.files.read(name, None), self.shape[1], self.scheme.group)

    def input_scale(self) -> float:
        raise AssertionError("activations stay as they are")

    def release(self) -> None:
        self.files.release(f"{self.prefix}.qweight")

    def _zeros(self, index: Index) -> np.ndarray:
        rows = slice(*index[0].indices(self.shape[0])[:2])
        words, cut = covering(rows, 32 // self.bits)
        packed = self.files.read(f"{self.prefix}.qzeros", (index[1], words))
        zeros = unpacked(packed, self.bits, 1, AWQ_ORDER if self.is_awq else None)[:, cut]
        return (zeros.astype(np.int32) + self.zero_shift & (1 << self.bits) - 1).T

    def _check_symmetric(self, index: Index) -> None:
        middle = 1 << self.bits - 1
        if (zeros := self._zeros(index)).size and (zeros != middle).any():
            raise CheckpointError(
                f"layer {self.prefix}: sym=true but its qzeros are not all {middle - self.zero_shift}; "
                "checkpoint_format or sym in the configuration is wrong"
            )


def sorted_inputs(name: str, groups: np.ndarray, inputs: int, group: int) -> np.ndarray:
    """The inputs, those of the first group first. Raises CheckpointError where groups are not of `group` each."""
    if groups.shape != (inputs,) or (groups < 0).any() or (groups * group >= inputs).any():
        raise CheckpointError(f"tensor {name} does not give each of {inputs} inputs one of {inputs // group} groups")
    if (np.bincount(groups, minlength=inputs // group) != group).any():
        raise CheckpointError(f"tensor {name} has groups of other sizes than group_size={group}")
    return np.argsort(groups, kind="stable").astype(np.int32)
