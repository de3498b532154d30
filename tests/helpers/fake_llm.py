"""`LLM` and `AsyncLLM` on a fake runner: real scheduler, pages, text and beam search; nothing is compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
import pytest

from jaxllm import LLM, AsyncLLM
from jaxllm.config import EngineConfig
from jaxllm.engine.build import BuiltEngine
from jaxllm.engine.engine import Engine
from jaxllm.families import read_config
from jaxllm.runner.shapes import RunnerShapes
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.tokenizer import load_tokenizer
from jaxllm.weights.abstract import make_model
from tests.helpers.byte_tokenizer import EOS_ID, VOCAB_SIZE, write_byte_tokenizer
from tests.helpers.fake_runner import FakeRunner

T = TypeVar("T", LLM, AsyncLLM)
HF_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


class FakeModel:
    """What every fake engine shares: the shapes of a tiny model, and a byte tokenizer."""

    def __init__(self, folder: Path):
        self.tokenizer = load_tokenizer(write_byte_tokenizer(folder))
        self.config = read_config(HF_CONFIG)
        config = EngineConfig(model="fake", dtype="float32", matmul_backend="xla")
        self.model = make_model(config, self.config, Placement(make_mesh("tp=1"), load_rules("megatron")))
        self.shapes = RunnerShapes(
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=120,
            num_pages=60,
            page_size=4,
            vocab_size=VOCAB_SIZE,
            token_buckets=(16,),
            row_buckets=(4,),
            max_decode_steps=4,
            kv_dtype=jnp.dtype("float32"),
            residual_dtype=jnp.dtype("float32"),
        )

    def engine(self, **shapes: Any) -> BuiltEngine:
        """A new engine; `shapes` change sizes."""
        runner: Any = FakeRunner(self.model, dataclasses.replace(self.shapes, **shapes))
        return BuiltEngine(Engine(runner, eos_token_ids=(EOS_ID,)), self.tokenizer, self.config, {"temperature": 0.0})

    def make(self, kind: type[T], monkeypatch: pytest.MonkeyPatch, sizes: dict[str, Any], **kwargs: Any) -> T:
        """An `LLM` or `AsyncLLM` of its own."""
        with monkeypatch.context() as patch:
            patch.setattr("jaxllm.entrypoints.frontend.build_alone", lambda *_, **__: self.engine(**sizes))
            return kind("fake", use_tqdm=False, **kwargs)
