"""NaN is no answer: a request whose numbers are not finite ends with an error, and nobody else notices.

The model is whole except for one token, whose embedding is NaN.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import LLM, AsyncLLM, BeamSearchParams, SamplingParams
from jaxllm.engine.errors import NotFinite
from jaxllm.server.errors import as_api_error

BROKEN = 255
GOOD = [[7] * 20, [97, 98, 99], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
BAD = [97] * 12 + [BROKEN] + [98] * 14
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "kv_cache_memory_bytes": 2 << 20,
    "use_tqdm": False,
}


@pytest.fixture(scope="module")
def broken(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_llama, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = np.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["auto", "xla"])
def llm(broken: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(str(broken), attention_backend=request.param, **SETTINGS)


def prompts(*ids: list[int]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": i} for i in ids]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 2**40 + 1},
        {"temperature": 0.0, "logprobs": 2},
    ],
)
def test_its_request_ends_with_an_error_and_its_neighbours_are_unharmed(llm: LLM, asked: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True, **asked)
    alone = [llm.generate(p, params)[0].outputs[0].token_ids for p in GOOD]
    before = llm.get_metrics()["requests_not_finite_total"]
    for _ in range(2):  # the second time it could find its own pages, and others get those that it left
        outputs = llm.generate(prompts(GOOD[0], BAD, *GOOD[1:]), params)
        bad = outputs.pop(1)
        assert "not finite" in (bad.error or "") and not bad.outputs[0].token_ids
        assert bad.outputs[0].finish_reason == "abort" and bad.num_cached_tokens == 0
        assert [o.outputs[0].token_ids for o in outputs] == alone and not any(o.error for o in outputs)
    assert llm.get_metrics()["requests_not_finite_total"] == before + 2
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


def test_streams_completions_scores_and_beams_hear_of_it(llm: LLM) -> None:
    (bad,) = prompts(BAD)
    with pytest.raises(NotFinite):
        list(llm.stream(bad, SamplingParams(temperature=0.0, max_tokens=4)))
    (output,) = llm.generate(bad, SamplingParams(n=3, max_tokens=4))
    assert output.error and [c.finish_reason for c in output.outputs] == ["abort"] * 3
    (output,) = llm.generate(bad, SamplingParams(prompt_logprobs=1, max_tokens=4))
    assert "not finite" in (output.error or "")
    with pytest.raises(NotFinite):
        llm.beam_search(bad, BeamSearchParams(beam_width=2, max_tokens=4))
    assert llm.generate(GOOD[1], SamplingParams(max_tokens=2))[0].error is None
    assert llm.engine.pool.num_free == llm.engine.pool.num_usable


def test_servers_hear_of_it(broken: Path) -> None:
    llm = AsyncLLM(str(broken), **SETTINGS)

    async def main() -> None:
        with pytest.raises(NotFinite) as caught:
            async for _ in llm.generate({"prompt_token_ids": BAD}, SamplingParams(max_tokens=3)):
                pass
        error = as_api_error(caught.value)
        assert error.status == 500 and error.body["error"]["code"] == "not_finite"
        with pytest.raises(NotFinite):
            await llm.embed([GOOD[0], BAD])
        (vector,) = await llm.embed([GOOD[0]])
        assert np.isfinite(vector).all()

    asyncio.run(main())
    llm.shutdown()
