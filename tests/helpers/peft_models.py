"""Adapters that PEFT makes, with random matrices on both sides, so that they change something."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

LINEAR = (
    "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj gate_up_proj c_attn c_proj c_fc q_a_proj "
    "q_b_proj kv_a_proj_with_mqa"
).split()


def add_adapter(model: Any, folder: Path, *, rank: int = 4, seed: int = 0, spread: float = 0.2, **config: Any) -> Any:
    """Put an adapter on a transformers model (in place), save it to `folder` and return the wrapped model."""
    import peft
    import torch

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = config.pop("target_modules", sorted(names & set(LINEAR)))
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers about each other
        wrapped = peft.get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * spread)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return wrapped
