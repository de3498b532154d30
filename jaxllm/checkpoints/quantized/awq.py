"""AWQ, `version: gemm`: `qweight [K, N/8]` with nibbles in an order of its own, `qzeros [K/g, N/8]`, `scales [K/g, N]`.

`w = (code - zero) * scale` (Lin et al. 2023; the layout is that of AutoAWQ's gemm kernels).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.base import Checkpoint
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.columns import Settings, columns_of, group_size
from jaxllm.checkpoints.quantized.layers import known, only

_WHERE = "quantization_config"


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    known(
        config,
        _WHERE,
        "quant_method",
        "bits",
        "w_bit",
        "group_size",
        "q_group_size",
        "zero_point",
        "version",
        "modules_to_not_convert",
        "backend",
        "do_fuse",
        "exllama_config",
        "modules_to_fuse",
        "fuse_max_seq_len",
    )
    version = config.get("version")
    only({"version": version.lower() if isinstance(version, str) else version}, _WHERE, "version", "gemm")
    only(config, _WHERE, "zero_point", True)
    bits = only({"bits": config.get("bits", config.get("w_bit", 4))}, _WHERE, "bits", 4)
    group = group_size(_WHERE, {"group_size": config.get("group_size", config.get("q_group_size", 128))})
    settings = Settings(bits=bits, group=group)
    return columns_of(config, checkpoint, lambda layer: settings, is_awq=True)
