"""The registry of model families: which file reads which Hugging Face architecture.

A family is a module with two functions: `config(hf) -> ModelConfig` and
`weight_map(config) -> dict[parameter path, Source]`. An architecture that is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.config import ModelConfig

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """How one decoder parameter is made: the checkpoint tensors it needs and a pure function over them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    assemble: Callable[..., np.ndarray]


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its configuration mapping and its weight-name map."""

    name: str
    config: Callable[[Mapping[str, Any]], ModelConfig]
    weight_map: Callable[[ModelConfig], dict[Path, Source]]
    ignored_tensors: tuple[str, ...] = ()


def family_of(hf: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face configuration, or raise ValueError naming what is supported."""
    from jaxllm.models import llama

    families = {"LlamaForCausalLM": llama.FAMILY}
    architectures = hf.get("architectures") or []
    for name in architectures:
        if name in families:
            return families[name]
    got = ", ".join(architectures) or "no architecture"
    raise ValueError(f"the model's configuration names {got}; supported architectures are {', '.join(families)}")
