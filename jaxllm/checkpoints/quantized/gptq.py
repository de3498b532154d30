"""GPTQ: `qweight [K/8, N]`, `qzeros [K/g, N/8]`, `scales [K/g, N]`; with `desc_act` the group of each input, `g_idx`.

The first version of the format stores each zero minus one, the second as it is (Frantar et al. 2022; the layout is
that of AutoGPTQ and GPTQModel). GPTQModel's `dynamic` gives layers settings of their own: the first expression that a
layer's name begins with counts; `-:` before it leaves the layer out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxllm.checkpoints.base import Checkpoint, CheckpointError
from jaxllm.checkpoints.quantized.checkpoint import Linears
from jaxllm.checkpoints.quantized.columns import Settings, columns_of, group_size
from jaxllm.checkpoints.quantized.layers import known, only

_WHERE = "quantization_config"
_OF_A_LAYER = ("bits", "group_size", "sym", "desc_act")
_OF_THE_METHOD = (  # how codes were found, not what they mean
    "damp_percent",
    "damp_auto_increment",
    "mse",
    "static_groups",
    "true_sequential",
    "act_group_aware",
)


def linears(config: Mapping[str, Any], checkpoint: Checkpoint) -> Linears:
    """See `Format`."""
    only(config, _WHERE, "is_marlin_format", False)
    only(config, _WHERE, "pack_dtype", "int32")
    version = only(config, _WHERE, "checkpoint_format", "gptq", "gptq_v2")
    own = _dynamic(config)
    general = _settings(_WHERE, config)

    def settings_of(layer: str) -> Settings | None:
        return next((settings for pattern, settings in own if pattern.match(layer)), general)

    return columns_of(config, checkpoint, settings_of, is_awq=False, zero_shift=1 if version == "gptq" else 0)


def _settings(where: str, config: Mapping[str, Any]) -> Settings:
    return Settings(
        bits=only(config, where, "bits", 4, 8),
        group=group_size(where, config),
        is_symmetric=only(config, where, "sym", True, False),
        is_permuted=only(config, where, "desc_act", False, True),
    )


def _dynamic(config: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Settings | None]]:
    """Expressions and what they give, in their order."""
    found = []
    for name, fields in (config.get("dynamic") or {}).items():
        where, expression = f"{_WHERE}: dynamic {name!r}", re.sub(r"^[+-]:", "", name)
        try:
            pattern = re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{where}: {error}") from None
        if name.startswith("-:"):
            found.append((pattern, None))
            continue
        known(fields, where, *_OF_A_LAYER, *_OF_THE_METHOD)
        changed = {key: fields[key] for key in _OF_A_LAYER if key in fields}
        found.append((pattern, _settings(where, {**config, **changed})))
    return found
