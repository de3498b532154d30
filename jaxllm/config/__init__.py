"""What a model is and how an engine runs it: frozen dataclasses, plain Python."""

from jaxllm.config.engine import ATTENTION_BACKENDS, DTYPES, EngineConfig
from jaxllm.config.model import ModelConfig
from jaxllm.config.parts import (
    CacheRow,
    ClampedSwiglu,
    DynamicScaling,
    LatentAttention,
    LinearScaling,
    LocalAttention,
    LongRopeScaling,
    Rope,
    RopeScaling,
    RoutedExperts,
    Scaling,
    YarnScaling,
)
from jaxllm.config.speculative import SpeculativeConfig

__all__ = [
    "ATTENTION_BACKENDS",
    "DTYPES",
    "CacheRow",
    "ClampedSwiglu",
    "DynamicScaling",
    "EngineConfig",
    "LatentAttention",
    "LinearScaling",
    "LocalAttention",
    "LongRopeScaling",
    "ModelConfig",
    "Rope",
    "RopeScaling",
    "RoutedExperts",
    "Scaling",
    "SpeculativeConfig",
    "YarnScaling",
]
