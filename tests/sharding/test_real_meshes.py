"""The real SmolLM2 (9 query heads on 3 key/value heads, 30 layers) on many meshes, against a naive NumPy forward pass.

One mesh by default; with JAXLLM_FULL_TESTS=1 all of them, nine devices included.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.reference import ReferenceLlama

pytestmark = pytest.mark.real_model

LENGTHS, NUM_NEW = (1, 9, 40, 90), 8
FULL = bool(os.environ.get("JAXLLM_FULL_TESTS"))
MESHES = [
    ("dp=2,tp=3", "megatron"),
    ("tp=3", "megatron"),
    ("tp=3", "megatron_sp"),
    ("tp=3", "column_only"),
    ("dp=2,tp=3", "dp_attention"),
    ("dp=8", "megatron"),
    ("dp=4", "dp_attention"),
    ("fsdp=8", "fsdp"),
    ("cp=4", "context"),
    ("cp=2,tp=3", "context"),
    ("dp=2,cp=4", "context"),
    ("ep=4", "expert"),
]
_NINE = """
import json, sys
from tests.sharding.test_real_meshes import generate
print(json.dumps(generate(*json.loads(sys.argv[1]))))
"""


def generate(path: str, mesh: str, rules: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of all prompts together: chunked, paged, with prefix caching."""
    from jaxllm import LLM, SamplingParams

    llm = LLM(
        path,
        mesh=mesh,
        sharding_rules=rules,
        dtype="float32",
        max_num_batched_tokens=64,
        page_size=16,
        max_num_seqs=4,
        max_model_len=128,
        kv_cache_memory_bytes=40 << 20,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    llm.engine.pool.check([])
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    ids = [rng.integers(100, 40000, length).tolist() for length in LENGTHS]
    return [*ids, ids[-1][:60] + ids[1]]


@pytest.fixture(scope="module")
def check(smollm2_path: Path, prompts: list[list[int]]):
    """Every token is the likeliest after those before it."""
    reference = ReferenceLlama(smollm2_path)
    likeliest = functools.cache(lambda number, output: reference.likeliest(prompts[number], list(output)))

    def check(outputs: list[list[int]]) -> None:
        assert [len(output) for output in outputs] == [NUM_NEW] * len(prompts)
        assert [likeliest(i, tuple(output)) for i, output in enumerate(outputs)] == outputs

    return check


@pytest.mark.parametrize(("mesh", "rules"), MESHES if FULL else MESHES[:1])
def test_greedy_tokens_are_those_of_a_naive_forward_pass(
    smollm2_path: Path, prompts, check, mesh: str, rules: str
) -> None:
    check(generate(str(smollm2_path), mesh, rules, prompts))


@pytest.mark.skipif(not FULL, reason="one of the full tests")
def test_nine_devices_hold_three_copies_of_each_key_value_head(
    smollm2_path: Path, prompts: list[list[int]], check, tmp_path: Path
) -> None:
    """The feed-forward width of 1536 does not divide by 9, so a rule file cuts the heads alone."""
    cut = 'heads = "tp"\nheads_in = "tp"\nvocab = "tp"\n'
    (tmp_path / "heads.toml").write_text(f"[parameters]\n{cut}[activations]\n{cut}", encoding="utf-8")
    arguments = json.dumps([str(smollm2_path), "tp=9", str(tmp_path / "heads.toml"), prompts])
    done = subprocess.run(
        [sys.executable, "-c", _NINE, arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "9"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check(json.loads(done.stdout.splitlines()[-1]))
