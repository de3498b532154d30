"""The numbers in GGUF's quantised blocks, as they are: codes, and scales and minima of groups.

`uint8 [.., B, bytes]` of blocks in; codes `[.., B, elements]` and scales `[.., B, groups]` out. The layouts are ggml's;
`w = scale * (code - offset) + minimum` gives exactly what its own dequantisation does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxllm.config.quantization import E2M1, Scheme

Decode = Callable[[np.ndarray], np.ndarray]
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of block."""

    scheme: Scheme
    codes: Decode
    scales: Decode
    minima: Decode | None = None


def _half(start: int) -> Decode:
    """A float16 of each block."""
    return lambda blocks: np.ascontiguousarray(blocks[..., start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(start: int) -> Decode:
    """16 bytes: their low halves, then their high ones."""
    return lambda blocks: _split(blocks[..., start : start + 16], (0, 4), 15, 16)


def _split(data: np.ndarray, shifts: tuple[int, ...], mask: int, run: int) -> np.ndarray:
    """Each run of bytes once for every shift: `[.., bytes]` -> `[.., bytes * shifts]`."""
    lead = data.shape[:-1]
    parts = data.reshape(*lead, -1, 1, run) >> np.array(shifts, np.uint8)[:, None]
    return (parts & np.uint8(mask)).reshape(*lead, -1)


def _five(start: int, offset: int) -> Decode:
    def codes(blocks: np.ndarray) -> np.ndarray:
        high = np.unpackbits(blocks[..., start : start + 4], axis=-1, bitorder="little")
        return ((_nibbles(start + 4)(blocks) | high << 4).astype(np.int8) - np.int8(offset)).astype(np.int8)

    return codes


def _k_scales(blocks: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima in 12 bytes."""
    low, high, both = (blocks[..., start + 4 * i : start + 4 * i + 4] for i in range(3))
    scales = np.concatenate([low & 63, (both & 15) | (low >> 2 & 48)], axis=-1)
    return scales, np.concatenate([high & 63, (both >> 4) | (high >> 2 & 48)], axis=-1)


def _q2_scales(blocks: np.ndarray) -> np.ndarray:
    return _half(80)(blocks) * (blocks[..., :16] & 15)


def _q2_minima(blocks: np.ndarray) -> np.ndarray:
    return -_half(82)(blocks) * (blocks[..., :16] >> 4)


def _q3_codes(blocks: np.ndarray) -> np.ndarray:
    low = _split(blocks[..., 32:96], (0, 2, 4, 6), 3, 32)
    high = _split(blocks[..., :32], tuple(range(8)), 1, 32)
    return low + 4 * high + 4  # with 8 for zero: what the high bit is missing from is 4 below


def _q3_scales(blocks: np.ndarray) -> np.ndarray:
    low, high = _split(blocks[..., 96:104], (0, 4), 15, 8), _split(blocks[..., 104:108], (0, 2, 4, 6), 3, 4)
    return _half(108)(blocks) * ((low | high << 4).astype(np.float32) - 32)


def _q4k_codes(blocks: np.ndarray) -> np.ndarray:
    return _split(blocks[..., 16:144], (0, 4), 15, 32)


def _k_scale(blocks: np.ndarray) -> np.ndarray:
    return _half(0)(blocks) * _k_scales(blocks, 4)[0]


def _k_minimum(blocks: np.ndarray) -> np.ndarray:
    return -_half(2)(blocks) * _k_scales(blocks, 4)[1]


def _q5k_codes(blocks: np.ndarray) -> np.ndarray:
    high = _split(blocks[..., 16:48], tuple(range(8)), 1, 32)
    return (_split(blocks[..., 48:176], (0, 4), 15, 32) | high << 4).view(np.int8)


def _q6_codes(blocks: np.ndarray) -> np.ndarray:
    low, high = _split(blocks[..., :128], (0, 4), 15, 64), _split(blocks[..., 128:192], (0, 2, 4, 6), 3, 32)
    return (low | high << 4).view(np.int8) - np.int8(32)


def _q6_scales(blocks: np.ndarray) -> np.ndarray:
    return _half(208)(blocks) * blocks[..., 192:208].view(np.int8)


def _exponent(blocks: np.ndarray) -> np.ndarray:
    return np.ldexp(np.float32(1), blocks[..., :1].astype(np.int32) - 127)


def _bytes(blocks: np.ndarray) -> np.ndarray:
    return blocks[..., 2:].view(np.int8)


_HALVES = {"scale_dtype": "float16", "group": 32}
KINDS = {
    "Q4_0": Kind(Scheme(codes="uint4", offset=8, **_HALVES), _nibbles(2), _half(0)),  # type: ignore[arg-type]
    "Q4_1": Kind(Scheme(codes="uint4", has_minima=True, **_HALVES), _nibbles(4), _half(0), _half(2)),  # type: ignore[arg-type]
    "Q5_0": Kind(Scheme(codes="int8", **_HALVES), _five(2, 16), _half(0)),  # type: ignore[arg-type]
    "Q5_1": Kind(Scheme(codes="int8", has_minima=True, **_HALVES), _five(4, 0), _half(0), _half(2)),  # type: ignore[arg-type]
    "Q8_0": Kind(Scheme(codes="int8", **_HALVES), _bytes, _half(0)),  # type: ignore[arg-type]
    "IQ4_NL": Kind(Scheme(codes="uint4", table=tuple(map(float, _IQ4_NL)), **_HALVES), _nibbles(2), _half(0)),  # type: ignore[arg-type]
    "MXFP4": Kind(Scheme(codes="uint4", table=E2M1, group=32, scale_dtype="float8_e8m0fnu"), _nibbles(1), _exponent),
    "Q2_K": Kind(
        Scheme(codes="uint4", group=16, has_minima=True),
        lambda blocks: _split(blocks[..., 16:80], (0, 2, 4, 6), 3, 32),
        _q2_scales,
        _q2_minima,
    ),
    "Q3_K": Kind(Scheme(codes="uint4", group=16, offset=8), _q3_codes, _q3_scales),
    "Q4_K": Kind(Scheme(codes="uint4", group=32, has_minima=True), _q4k_codes, _k_scale, _k_minimum),
    "Q5_K": Kind(Scheme(codes="int8", group=32, has_minima=True), _q5k_codes, _k_scale, _k_minimum),
    "Q6_K": Kind(Scheme(codes="int8", group=16), _q6_codes, _q6_scales),
}
