"""GGUF blocks kept as codes and scales stand for exactly what the gguf library makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from jaxllm.checkpoints.gguf.blocks import KINDS


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_scales_stand_for_the_library_s_values(name: str) -> None:
    kind, scheme = KINDS[name], KINDS[name].scheme
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 5, size), dtype=np.uint8)
    for start in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(name, (0, 2)):
        if start == 0 or scheme.has_minima or name in ("Q2_K", "Q3_K", "Q6_K"):
            half = rng.normal(size=(3, 5)).astype(np.float16)
            blocks[..., start : start + 2] = half[..., None].view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(100, 140, (3, 5))
    want = gguf.quants.dequantize(blocks.reshape(3, -1), gguf.GGMLQuantizationType[name]).reshape(3, 5, elements)
    codes = kind.codes(blocks)
    assert codes.shape == want.shape and codes.dtype == (np.uint8 if scheme.bits == 4 else np.int8)
    numbers = np.array(scheme.table, np.float32)[codes] if scheme.table else codes.astype(np.float32) - scheme.offset
    scales = np.repeat(kind.scales(blocks), scheme.group, axis=-1)
    got = numbers * scales
    if kind.minima is not None:
        got = got + np.repeat(kind.minima(blocks), scheme.group, axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
