"""GPTQ: `qweight [K/8, N]`, `qzeros [K/g, N/8]`, `scales [K/g, N]`; with `desc_act` the group of each input, `g_idx`.

The first version of the format stores each zero minus one, the second as it is (Frantar et al. 2022; the layout is
that of AutoGPTQ and GPTQModel).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.base import Checkpoint, CheckpointError
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.columns import columns_of
from jaxllm.checkpoints.quantized.layers import only

_WHERE = "quantization_config"


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    overrides = config.get("dynamic") or {}
    if any(not str(pattern).startswith("-:") for pattern in overrides):
        raise CheckpointError(
            f"{_WHERE} has dynamic={dict(overrides)!r}: layers with settings of their own are not supported"
        )
    bits = only(config, _WHERE, "bits", 4, 8)
    only(config, _WHERE, "is_marlin_format", False)
    only(config, _WHERE, "pack_dtype", "int32")
    version = only(config, _WHERE, "checkpoint_format", "gptq", "gptq_v2")
    return columns_of(
        config,
        checkpoint,
        bits=bits,
        group=config.get("group_size", 128),
        is_awq=False,
        is_symmetric=only(config, _WHERE, "sym", True, False),
        zero_shift=1 if version == "gptq" else 0,
        is_permuted=only(config, _WHERE, "desc_act", False, True),
    )
