"""Adapters side by side: each request gets its own numbers, whatever runs beside it, and nothing is compiled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from jaxllm import LLM, LoRARequest, SamplingParams
from jaxllm.adapters.panels import LowRankPanels
from jaxllm.ops.cpu import ffi
from tests.adapters.conftest import ENGINE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::RuntimeWarning")
PROMPT = "an adapter changes what follows this prompt"
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folders):
    return LLM(str(folders.base), use_tqdm=False, **ENGINE)


@pytest.fixture(scope="module")
def requests(folders):
    return [None, *(LoRARequest(f"a{i}", i + 1, str(path)) for i, path in enumerate(folders.adapters))]


def tokens(llm, prompts, requests):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, lora_request=requests)]


def test_tokens_are_pefts_and_four_adapters_and_the_base_in_one_batch_equal_each_alone(llm, requests, folders):
    import peft
    import transformers

    ids = llm.get_tokenizer().encode(PROMPT)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders.base)
    model = peft.PeftModel.from_pretrained(base, folders.adapters[1]).eval()
    given = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    alone = [tokens(llm, PROMPT, one)[0] for one in requests]
    assert alone[2] == out[0, len(ids) :].tolist()
    assert len(set(map(tuple, alone))) == len(requests)  # each changes something
    # More adapters than slots: they take turns.
    assert tokens(llm, [PROMPT] * 10, [*requests, *requests]) == alone * 2
    compiled = llm.engine.runner.num_compilations
    assert tokens(llm, [PROMPT] * 10, [*requests[::-1], *requests[::-1]]) == alone[::-1] * 2
    assert llm.engine.runner.num_compilations == compiled


def test_cached_prefixes_are_an_adapters_own(llm, requests):
    prompt = "a prompt of more than one page " * 2
    first = llm.generate(prompt, PARAMS, lora_request=requests[1])[0]
    other, again = llm.generate([prompt] * 2, PARAMS, lora_request=[requests[2], requests[1]])
    assert (first.num_cached_tokens, other.num_cached_tokens) == (0, 0)
    assert again.num_cached_tokens > 16 and again.outputs[0].token_ids == first.outputs[0].token_ids
    assert other.outputs[0].token_ids != first.outputs[0].token_ids


def test_drafts_are_verified_by_each_requests_own_adapter(llm, requests, folders):
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    drafting = LLM(str(folders.base), use_tqdm=False, **ENGINE | {"max_decode_steps": 4}, speculative_config=config)
    drafting.engine.runner.draft_price = lambda rows: -1.0  # verify whatever there is
    prompts = ["again and again and again"] * len(requests)
    expected = tokens(llm, prompts, requests)
    assert tokens(drafting, prompts, requests) == expected and len(set(map(tuple, expected))) > 2
    drafts = drafting.engine.drafts
    assert 0 < drafts.num_accepted_tokens < drafts.num_draft_tokens


def test_prompt_logprobs_are_an_adapters_own(llm, requests):
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    scored = [llm.generate(PROMPT, params, lora_request=one)[0].prompt_logprobs for one in requests[:3]]
    values = [[next(iter(entry.values())).logprob for entry in one[1:]] for one in scored]
    assert values[0] != values[1] != values[2]


def test_what_cannot_be_served_is_refused_in_one_line(llm, folders, tmp_path):
    def changed(name, **config):
        folder = shutil.copytree(folders.adapters[0], tmp_path / name)
        text = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(text | config))
        return str(folder)

    def refusal(path):
        with pytest.raises(ValueError, match=r"adapter|rank|module|number") as caught:
            llm.generate(PROMPT, PARAMS, lora_request=LoRARequest("bad", 9, path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "DoRA" in refusal(changed("dora", use_dora=True))
    assert "peft_type='IA3'" in refusal(changed("ia3", peft_type="IA3"))
    assert "modules_to_save" in refusal(changed("saved", modules_to_save=["lm_head"]))
    assert "init_lora_weights='pissa'" in refusal(changed("pissa", init_lora_weights="pissa"))
    assert "bias='all'" in refusal(changed("bias", bias="all"))
    assert "has rank 4" in refusal(changed("rank", r=3))
    assert "no adapter_config.json" in refusal(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="give a LoRARequest"):
        llm.generate(PROMPT, PARAMS, lora_request=7)
    with pytest.raises(ValueError, match="lora_int_id=0"):
        LoRARequest("x", 0, "y")


def test_matrices_that_do_not_fit_are_refused_by_name(llm, folders, tmp_path):
    import numpy as np

    from jaxllm.adapters.peft import LoraConfig, write_peft

    def refusal(module, inputs, outputs, rank=4, value=0.0):
        a, b = np.full((rank, inputs), value, np.float32), np.zeros((outputs, rank), np.float32)
        write_peft(tmp_path / "made", {module: (a, b)}, LoraConfig(r=rank))
        with pytest.raises(ValueError, match=r"adapter|rank|module|number") as caught:
            llm.adapters.load("bad", tmp_path / "made", replace=True)
        return str(caught.value)

    assert "q_proj has lora_A [4, 32]" in refusal("model.layers.0.self_attn.q_proj", 32, 64)
    assert "layers.9" in refusal("model.layers.9.self_attn.q_proj", 64, 64)
    assert "lm_head" in refusal("lm_head", 64, 64)
    assert "experts do not" in refusal("model.layers.0.mlp.experts.0.up_proj", 64, 64)
    assert "rank 9; at most 8" in refusal("model.layers.0.self_attn.q_proj", 64, 64, rank=9)
    assert "NaN" in refusal("model.layers.0.self_attn.q_proj", 64, 64, value=float("nan"))


def test_as_many_adapters_as_asked_for_stay_ready_and_the_others_are_read_again(folders, llm):
    from jaxllm.adapters.store import AdapterStore

    store = AdapterStore(llm.engine.runner.model.targets, 8, 3)
    made = [store.load(f"a{i}", path) for i, path in enumerate(folders.adapters)]
    assert [store.get(f"a{i}") is made[i] for i in (1, 2, 3)] == [True] * 3
    again = store.get("a0")  # pushes out the one that was asked for longest ago
    assert again is not made[0] and again.identity == made[0].identity
    assert store.get("a1") is not made[1] and store.get("a3") is made[3]


def test_what_adapters_do_not_go_with_is_refused_before_anything_is_loaded():
    from jaxllm import EngineConfig

    with pytest.raises(ValueError, match="max_cpu_loras=1 is below max_loras=2"):
        EngineConfig(max_loras=2, max_cpu_loras=1)


def test_without_enable_lora_nothing_is_taken(folders):
    llm = LLM(str(folders.base), use_tqdm=False, dtype="float32", max_model_len=32, kv_cache_memory_bytes=1 << 20)
    assert llm.engine.runner.state.adapters == {}
    with pytest.raises(ValueError, match="adapters are off; start with enable_lora=True"):
        llm.generate(PROMPT, PARAMS, lora_request=LoRARequest("a", 1, str(folders.adapters[0])))


@pytest.mark.parametrize("mesh", ["tp=4", "dp=2,tp=2"])
def test_a_mesh_gives_the_same_tokens(llm, requests, folders, mesh):
    """On four devices keys and values have copies, and so have the matrices that make them."""
    on_mesh = LLM(str(folders.base), use_tqdm=False, mesh=mesh, **ENGINE)
    assert tokens(on_mesh, [PROMPT] * 3, requests[:3]) == tokens(llm, [PROMPT] * 3, requests[:3])


def test_two_pools_serve_the_same_numbers(llm, requests, folders):
    """The prefill pool has every head twice, so its arrays differ from those that are made ready."""
    two = LLM(str(folders.base), use_tqdm=False, prefill_mesh="tp=4", decode_mesh="tp=1", **ENGINE)
    prompts = [PROMPT, PROMPT * 2, *([PROMPT] * 3)]
    assert tokens(two, prompts, requests) == tokens(llm, prompts, requests)
    assert two.engine.transfers.handed_over == len(requests)
    scored = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    ours, theirs = (one.generate(PROMPT, scored, lora_request=requests[2])[0].prompt_logprobs for one in (two, llm))
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert {t: v.logprob for t, v in a.items()} == pytest.approx({t: v.logprob for t, v in b.items()}, abs=1e-3)
    for engine in two.engine.engines:
        engine.pool.check([])


@pytest.mark.skipif(bool(ffi.unavailable()), reason="the processor has no kernels for bfloat16")
def test_the_processors_kernel_gives_the_logprobs_of_xla(folders, requests):
    """Three adapters and the base in one batch: prompts longer than an iteration, decodes of one row each."""
    params = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=0, logprobs=0)
    seen = {}
    for backend in ("xla", "llvm"):
        sizes = ENGINE | {"dtype": "bfloat16", "max_loras": 3, "max_model_len": 64, "max_num_batched_tokens": 32}
        llm = LLM(str(folders.base), use_tqdm=False, matmul_backend=backend, **sizes)
        kinds = {type(matrices) for matrices in llm.engine.runner.state.adapters.values()}
        assert (LowRankPanels in kinds) == (backend == "llvm")
        outputs = llm.generate([PROMPT] * 4, params, lora_request=requests[:4])
        seen[backend] = [
            [next(iter(entry.values())).logprob for entry in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)]
            for output in outputs
        ]
    np.testing.assert_allclose(seen["llvm"], seen["xla"], atol=0.05, rtol=0)
    base, *adapted = np.array(seen["llvm"])
    assert all(np.abs(base - one).max() > 0.5 for one in adapted)
