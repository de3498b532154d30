"""What a pool's model may bring along: adapters that requests name, and a model that drafts for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.adapters.lora_request import LoRARequest
from jaxllm.engine.errors import EngineError
from jaxllm.pool.pool import Pool
from tests.helpers.peft_models import add_adapter
from tests.pool.conftest import BUDGET, ENGINE, check_nothing_leaked

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello", "x" * 40]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def adapter(four_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("adapter")
    add_adapter(transformers.AutoModelForCausalLM.from_pretrained(four_models["llama"]), folder, spread=0.3)
    return folder


def test_adapters_and_draft_models_go_where_their_model_goes(four_models: dict[str, Path], adapter: Path, monkeypatch):
    llama = str(four_models["llama"])
    tuned = LLM(llama, enable_lora=True, max_loras=1, **ENGINE)
    expected = tokens(tuned.generate(PROMPTS, GREEDY, lora_request=LoRARequest("poet", 1, str(adapter))))
    plain = tokens(tuned.generate(PROMPTS, GREEDY))
    assert expected != plain
    drafts = {"method": "draft_model", "model": llama, "num_speculative_tokens": 2}
    models = {
        "plain": {"path": llama, "lora_modules": {"poet": str(adapter)}, "max_loras": 1},
        "drafted": {"path": llama, "speculative_config": drafts},
    }
    with Pool(models, device_memory_bytes=BUDGET * 5 // 8, **ENGINE) as pool:
        for level in (1, 2):
            for name, answer in (("poet", expected), ("drafted", plain), ("plain", plain)):
                assert tokens(pool.generate(name, PROMPTS, GREEDY)) == answer, name
            pool.sleep("plain", level)
            pool.sleep("drafted", level)
        assert pool.llm("drafted").engine.drafts.num_accepted_tokens > 0
        assert pool.residents.totals.count >= 4, "the two do not fit at once"
        held, sizes = pool.residents.budget.used, pool.model("plain").residence.sizes
        assert held == sizes.staying > 0, "adapters stay"
        check_nothing_leaked(pool)
        monkeypatch.setattr(pool.host_kv, "read", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(EngineError, match="the model failed"):
            pool.generate("drafted", PROMPTS, GREEDY)
        used = pool.driver.call(lambda: pool.residents.budget.used).result(60)
        assert used == held, "a model whose cache cannot come leaves nothing behind"
        monkeypatch.undo()
        assert tokens(pool.generate("poet", PROMPTS, GREEDY)) == expected
        pool.undeploy("plain").result(60)
        assert pool.residents.budget.used == 0 and pool.host_kv.slabs.num_used == 0


def test_an_adapter_that_is_none_fails_its_model_in_words(four_models: dict[str, Path], tmp_path: Path):
    models = {"a": {"path": str(four_models["llama"]), "lora_modules": {"b": str(tmp_path)}}}
    with Pool(models, device_memory_bytes=BUDGET, **ENGINE) as pool:
        with pytest.raises(ValueError, match=r"no adapter_config\.json"):
            pool.generate("b", "x")
        assert pool.residents.budget.used == 0
