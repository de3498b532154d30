"""Four tiny models of four families, and a pool that holds two of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm.pool.cache_part import Where
from jaxllm.pool.pool import Pool
from tests.helpers.tiny_model import write_tiny_model

ENGINE = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "page_size": 4,
    "kv_cache_memory_bytes": 640 << 10,
    "max_decode_steps": 2,
}
FAMILIES = {"llama": "Llama", "qwen": "Qwen3", "mistral": "Mistral", "olmo": "Olmo2"}
BUDGET = 3_200_000


@pytest.fixture(scope="session")
def four_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_tiny_model(tmp_path_factory.mktemp(name), family=family, hidden_size=32 + 32 * (i % 2))
        for i, (name, family) in enumerate(FAMILIES.items())
    }


@pytest.fixture(scope="module")
def pool(four_models: dict[str, Path]) -> Iterator[Pool]:
    with Pool({name: str(path) for name, path in four_models.items()}, device_memory_bytes=BUDGET, **ENGINE) as made:
        yield made
        check_nothing_leaked(made)


def check_nothing_leaked(pool: Pool) -> None:
    """No page is held, every slab and byte is accounted for, and what lies on the device is what the books say."""
    pool.host_kv.slabs.check()
    assert pool.residents.budget.peak <= pool.residents.budget.limit
    blocks = 0
    for model in pool.models:
        assert not model.open and not model.prefilling
        if model.residence is None or model.llm is None:
            continue
        engine = model.llm.engine
        engine.pool.check([])
        assert not engine.unfinished
        sizes, here, cache = model.residence.sizes, model.residence, model.residence.cache
        held = sizes.weights * (here.has_weights or model.fetching is not None)
        held += sizes.cache * (cache.where is not Where.AWAY)
        assert pool.residents.budget.held(model.name) == held, model.name
        blocks += cache.host_bytes
    assert pool.host_kv.slabs.used_bytes == blocks
