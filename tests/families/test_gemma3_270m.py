"""The real Gemma 3 270M, from GGUF, continues a text exactly as transformers does with the same weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.checkpoints import open_checkpoint, pull

TEXT = (
    "The lighthouse keeper climbed the stairs every evening at dusk, lit the lamp, and wrote one line in the log. "
    "One winter a ship ran onto the rocks in spite of the light, and"
)


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    return pull("gemma-3-270m", progress=False)


@pytest.mark.real_model
@pytest.mark.skipif(
    "JAXLLM_FULL_TESTS" not in os.environ, reason="fetches 240 MB and takes a minute: set JAXLLM_FULL_TESTS=1"
)
def test_gemma3_270m_gives_the_same_64_greedy_tokens_as_transformers(gemma3_path: Path) -> None:
    llm = LLM(str(gemma3_path), dtype="float32", max_model_len=256, max_num_seqs=4, max_num_batched_tokens=16)
    prompt = llm.get_tokenizer().encode(TEXT)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
    assert output.outputs[0].token_ids == transformers_tokens(gemma3_path, prompt, 64)


def transformers_tokens(path: Path, prompt: list[int], num_tokens: int) -> list[int]:
    import torch
    import transformers

    checkpoint = open_checkpoint(path)
    hf = {key: value for key, value in checkpoint.config.items() if key not in ("architectures", "model_type")}
    config = transformers.Gemma3TextConfig(**hf)
    fresh = transformers.Gemma3ForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={n: torch.tensor(checkpoint.read(n)) for n in checkpoint.tensors},
        dtype=torch.float32,
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = fresh.eval().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()
