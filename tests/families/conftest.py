"""The tiny checkpoints, made once, and the engine around them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

CHUNK = 8  # prefill in pieces smaller than most windows
PROMPT_LENGTHS = (1, 7, 30)  # the last is beyond every window
NUM_TOKENS = 32


@dataclass(frozen=True)
class TinyModel:
    """One family's checkpoint with what transformers computes from it, where a test asks for that."""

    folder: Path
    model: Any
    prompts: list[list[int]]

    @cached_property
    def _reference(self) -> tuple[list[np.ndarray], list[list[int]]]:
        import tiny

        return tiny.reference(self.model, self.prompts, NUM_TOKENS)

    @property
    def logits(self) -> list[np.ndarray]:
        """Of every position of each prompt."""
        return self._reference[0]

    @property
    def tokens(self) -> list[list[int]]:
        """Greedy continuations."""
        return self._reference[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """`tiny_model(name)`: made on first use."""

    @cache
    def make(name: str) -> TinyModel:
        import tiny

        folder = tmp_path_factory.mktemp(name)
        model = tiny.save_tiny(name, folder)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, tiny.VOCAB, n).tolist() for n in PROMPT_LENGTHS]
        return TinyModel(folder, model, prompts)

    return make


@dataclass(frozen=True)
class Loaded:
    """A model on a mesh with its engine."""

    model: Any
    params: Any
    engine: Any

    def logits(self, prompt: list[int]) -> np.ndarray:
        """Logits of every position, through the compiled ragged step, chunk by chunk over the paged cache."""
        from tests.helpers.logits import engine_logits

        return engine_logits(self.engine, prompt)

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Greedy tokens of all prompts together, through scheduler, chunked prefill and the decode loop."""
        from jaxllm.config.sampling import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        requests = [self.engine.add_request(prompt, params) for prompt in prompts]
        while self.engine.has_work:
            self.engine.step()
        return [request.token_ids[request.num_prompt :] for request in requests]


@pytest.fixture(scope="session")
def load() -> Callable[..., Loaded]:
    """`load(folder, mesh)`: a model in float32 with an engine of small pages and chunks."""

    @cache
    def make(folder: Path, mesh: str = "tp=1", rules: str = "megatron") -> Loaded:
        from jaxllm.checkpoints import open_checkpoint
        from jaxllm.config import EngineConfig
        from jaxllm.engine.engine import Engine
        from jaxllm.families import read_config
        from jaxllm.runner.runner import ModelRunner
        from jaxllm.runner.shapes import runner_shapes
        from jaxllm.sharding.mesh import Placement, make_mesh
        from jaxllm.sharding.rules import load_rules
        from jaxllm.weights.abstract import make_model
        from jaxllm.weights.loader import load_parameters

        config = EngineConfig(
            model=str(folder),
            dtype="float32",
            mesh=mesh,
            sharding_rules=rules,
            max_model_len=64,
            max_num_seqs=CHUNK,
            max_num_batched_tokens=CHUNK,
            page_size=4,
            max_decode_steps=4,
            kv_cache_memory_bytes=8 << 20,
        )
        checkpoint = open_checkpoint(folder)
        cfg = read_config(checkpoint.config)
        model = make_model(config, cfg, Placement(make_mesh(mesh), load_rules(rules)))
        params = load_parameters(model, checkpoint)
        runner = ModelRunner(model, runner_shapes(config, model))
        runner.start(params)
        return Loaded(model, params, Engine(runner))

    return make
