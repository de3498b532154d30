"""How tokens are guessed ahead, to be checked several at a time. Plain Python; names as in vLLM's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxllm.config.fields import check_types

Method = Literal["ngram", "draft_model"]
MAX_SPECULATIVE_TOKENS = 16
_DEFAULT_LOOKUP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Where drafts come from, and how long they are.

    Attributes:
        method: ngram takes what followed the last tokens where they stood before, in prompt or output; draft_model
            asks a smaller model.
        model: the draft model: short name, folder, .gguf file or Hugging Face id, with the same vocabulary.
        num_speculative_tokens (N): drafted per iteration at most; fewer where they are seldom right or the batch
            fills the device.
        prompt_lookup_max (N): the most last tokens that are looked up; default: prompt_lookup_min, or else 5.
        prompt_lookup_min (N): the fewest; default: prompt_lookup_max, or else 5.
    """

    method: Method = "ngram"
    model: str | None = None
    num_speculative_tokens: int
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ValueError(f"speculative_config: method={self.method!r} is not supported; use one of {known}")
        check_types(self)
        if not 1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"speculative_config: num_speculative_tokens={self.num_speculative_tokens}; it must be in "
                f"1..{MAX_SPECULATIVE_TOKENS}"
            )
        if (self.method == "draft_model") != (self.model is not None):
            raise ValueError("speculative_config: method 'draft_model' and model belong together; set both or neither")
        if self.model is not None and (self.prompt_lookup_max or self.prompt_lookup_min):
            raise ValueError("speculative_config: prompt_lookup_max and prompt_lookup_min are for method 'ngram'")
        if not 1 <= self.shortest_lookup <= self.longest_lookup <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"speculative_config: prompt_lookup_min={self.shortest_lookup} and "
                f"prompt_lookup_max={self.longest_lookup}; need 1 <= min <= max <= {MAX_SPECULATIVE_TOKENS}"
            )

    @property
    def longest_lookup(self) -> int:
        """See `prompt_lookup_max`."""
        return self.prompt_lookup_max or self.prompt_lookup_min or _DEFAULT_LOOKUP

    @property
    def shortest_lookup(self) -> int:
        """See `prompt_lookup_min`."""
        return self.prompt_lookup_min or self.prompt_lookup_max or _DEFAULT_LOOKUP

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> SpeculativeConfig:
        """From `--speculative-config`'s object. Raises ValueError, in one line, for what it does not know."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"speculative_config: unknown key {unknown[0]!r}; known ones are {', '.join(known)}")
        if "num_speculative_tokens" not in given:
            raise ValueError("speculative_config needs num_speculative_tokens, for example 4")
        try:
            return cls(**given)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith("speculative") else f"speculative_config: {text}") from None
