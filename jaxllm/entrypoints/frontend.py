"""What `LLM` and `AsyncLLM` have in common: a built engine, its text side, one step of both, and their recovery."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from jaxllm.adapters.lora_request import LoRARequest
from jaxllm.config import EngineConfig
from jaxllm.config.sampling import SamplingParams
from jaxllm.disaggregation.build import build_alone, build_pools, events_of, exchange_of
from jaxllm.engine.build import BuiltEngine
from jaxllm.engine.completions import Jobs, sampling_defaults
from jaxllm.scheduling.adapter_slots import Adapter

log = logging.getLogger(__name__)


class Frontend:
    """Abstract: a model that is loaded.

    Args:
        model: a short name, a folder, a `.gguf` file or a Hugging Face id; the default is a small real model.
        use_tqdm: progress bars on a terminal.
        on_stage: told what is being done while the model is loaded.
        built: the engine that `kwargs` describe, where somebody has built it already.
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
        built: BuiltEngine | None = None,
        **kwargs: Any,
    ):
        if model is not None:
            kwargs["model"] = model
        self.config = EngineConfig.from_kwargs(kwargs)
        build = build_alone if self.config.prefill_mesh is None else build_pools
        built = built or build(self.config, progress=use_tqdm, on_stage=on_stage)
        self.engine, self.model_config = built.engine, built.model_config
        self.exchange = exchange_of(self.config, built)
        self.events = events_of(self.config, built)
        self._jobs = Jobs(built.engine, built.tokenizer, self.exchange, built.classifier)
        if self.events is not None:
            self._jobs.after_step.append(self.events.flush)
        self._generation_config = built.generation_config
        self.adapters = built.adapters

    def adapter_of(self, lora_request: LoRARequest | str | None) -> Adapter | None:
        """What a call names: a `LoRARequest`, or the name of an adapter that is served. Raises ValueError."""
        if lora_request is None:
            return None
        if isinstance(lora_request, str):
            return self.adapters.get(lora_request)
        if not isinstance(lora_request, LoRARequest):
            raise ValueError(f"lora_request is a {type(lora_request).__name__}; give a LoRARequest(name, id, path)")
        r = lora_request
        return self.adapters.of(r.lora_name, r.lora_int_id, r.lora_path, replace=r.load_inplace)

    @property
    def jobs(self) -> Jobs:
        """Prompts and engine, for callers that submit work themselves."""
        return self._jobs

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

    def save_cache(self) -> None:
        """Write cached prefixes to the disk tier, if there is one, for 10 s at most; nobody else may use the engine."""
        try:
            self.engine.save_cache()
        except Exception as error:  # the devices are gone, say; whoever ends shall end
            log.error("the KV cache could not be saved", exc_info=error)

    def at_exit(self, close: Callable[[], None]) -> None:
        """Let the interpreter call this method of `self` before it ends, where there is anything to save."""
        if self.config.disk_kv_bytes:
            atexit.register(_call, weakref.WeakMethod(close))


def _call(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    if (close := method()) is not None:
        close()
