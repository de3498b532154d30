"""jaxllm: sharded LLM inference on JAX/XLA for CPU, GPU and TPU. Importing it loads no JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxllm.adapters.lora_request import LoRARequest
    from jaxllm.config import EngineConfig, ModelConfig
    from jaxllm.config.sampling import SamplingParams
    from jaxllm.decoding.beam_search import BeamSearchParams
    from jaxllm.engine.outputs import CompletionOutput, RequestOutput
    from jaxllm.entrypoints.async_llm import AsyncLLM
    from jaxllm.entrypoints.llm import LLM
    from jaxllm.pool.pool import Pool

from jaxllm.version import __version__ as __version__

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EngineConfig",
    "LoRARequest",
    "ModelConfig",
    "Pool",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LoRARequest": "jaxllm.adapters.lora_request",
    "LLM": "jaxllm.entrypoints.llm",
    "AsyncLLM": "jaxllm.entrypoints.async_llm",
    "Pool": "jaxllm.pool.pool",
    "BeamSearchParams": "jaxllm.decoding.beam_search",
    "SamplingParams": "jaxllm.config.sampling",
    "RequestOutput": "jaxllm.engine.outputs",
    "CompletionOutput": "jaxllm.engine.outputs",
    "EngineConfig": "jaxllm.config",
    "ModelConfig": "jaxllm.config",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
