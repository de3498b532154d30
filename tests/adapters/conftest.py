"""A tiny model with adapters that PEFT made, and engines around it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

NUM_ADAPTERS = 4
ENGINE = {
    "dtype": "float32",
    "enable_lora": True,
    "max_loras": 2,
    "max_cpu_loras": 3,
    "max_lora_rank": 8,
    "max_model_len": 128,
    "kv_cache_memory_bytes": 1 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
}


@dataclass(frozen=True)
class Folders:
    """Where the model and its adapters are."""

    base: Path
    adapters: tuple[Path, ...]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    import transformers

    from tests.helpers.peft_models import add_adapter
    from tests.helpers.tiny_model import write_tiny_model

    root = tmp_path_factory.mktemp("adapters")
    base, found = write_tiny_model(root / "base"), []
    for i in range(NUM_ADAPTERS):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        add_adapter(model, root / f"a{i}", rank=(4, 8, 2, 6)[i], seed=i, spread=0.3, use_rslora=i == 1)
        found.append(root / f"a{i}")
    return Folders(base, tuple(found))
