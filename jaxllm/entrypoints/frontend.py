"""What `LLM` and `AsyncLLM` have in common: a built engine, its text side, one step of both, and their recovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.build import build_engine
from jaxllm.engine.completions import Jobs, sampling_defaults


class Frontend:
    """Abstract: a model that is loaded.

    Args:
        model: a short name, a folder, a `.gguf` file or a Hugging Face id; the default is a small real model.
        use_tqdm: progress bars on a terminal.
        on_stage: told what is being done while the model is loaded.
        **kwargs: the fields of `EngineConfig`.

    Raises:
        ValueError: in one line, what cannot be done and what to do instead.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        use_tqdm: bool = True,
        on_stage: Callable[[str], None] | None = None,
        **kwargs: Any,
    ):
        if model is not None:
            kwargs["model"] = model
        self.config = EngineConfig.from_kwargs(kwargs)
        built = build_engine(self.config, progress=use_tqdm, on_stage=on_stage)
        self.engine, self.model_config = built.engine, built.model_config
        self._jobs = Jobs(built.engine, built.tokenizer)
        self._generation_config = built.generation_config

    def get_tokenizer(self) -> Any:
        """The tokenizer. Raises ValueError under `skip_tokenizer_init`."""
        return self._jobs.tokenizer

    def generation_defaults(self) -> dict[str, Any]:
        """Sampling values that the model's own generation config asks for."""
        return sampling_defaults(self._generation_config)

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used where no sampling parameters are given."""
        return SamplingParams(**self.generation_defaults())

    def chat_prompt(self, messages: Sequence[Any], **kwargs: Any) -> dict[str, Any]:
        """A conversation as a prompt; see `Tokenizer.chat_prompt`."""
        return self.get_tokenizer().chat_prompt(messages, **kwargs)
