"""Fields that other servers take and this one does not: what to use instead, by name.

vLLM, SGLang, llama.cpp and Ollama clients send them; ignoring one would change the answer in silence. A value that
asks for nothing (`Other.harmless`) is let pass, since clients send defaults too. Data only; `schema_rules.py` reads it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

NOT_SUPPORTED = "is not supported; leave it out"


@dataclass(frozen=True, slots=True)
class Other:
    """What a field's message says after its name, and the values that change nothing here.

    `instead` are fields that mean the same, of which a request class has one, all or none; without them it is `advice`.
    """

    advice: str
    harmless: tuple[Any, ...] = ()
    instead: tuple[str, ...] = ()

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether it may be let pass."""
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.harmless)

    def message(self, known: Collection[str]) -> str:
        """For a request that has the `known` fields."""
        fitting = [name for name in self.instead if name.split(".")[0].split(",")[0] in known]
        return f"is not a field here; use {fitting[0]}" if fitting else self.advice


def _use(instead: str | tuple[str, ...], *harmless: Any) -> Other:
    return Other(NOT_SUPPORTED, harmless, (instead,) if isinstance(instead, str) else instead)


def _say(advice: str, *harmless: Any) -> Other:
    return Other(advice, harmless)


def _no(*harmless: Any) -> Other:
    return Other(NOT_SUPPORTED, harmless)


_LIMIT = ("max_tokens", "max_output_tokens")
_OFF = (0, 0.0, False)
OTHERS: dict[str, Other] = {
    # OpenAI, older and other parts
    "functions": _use("tools", []),
    "function_call": _use("tool_choice"),
    "audio": _no(),
    "modalities": _no(["text"]),
    "prediction": _no(),
    "web_search_options": _no(),
    # vLLM
    "guided_json": _use("structured_outputs.json"),
    "guided_regex": _use("structured_outputs.regex"),
    "guided_choice": _use("structured_outputs.choice"),
    "guided_grammar": _use("structured_outputs.grammar"),
    "guided_decoding_backend": _no("auto"),
    "guided_whitespace_pattern": _no(),
    "structural_tag": _use("structured_outputs.grammar"),
    "use_beam_search": _say("is not served; use LLM.beam_search in Python", False),
    "length_penalty": _say("belongs to beam search, which is not served; use LLM.beam_search in Python", 1, 1.0),
    "early_stopping": _say("belongs to beam search, which is not served; use LLM.beam_search in Python", False),
    "logits_processors": _no([]),
    "mm_processor_kwargs": _no({}),
    "media_io_kwargs": _no({}),
    "kv_transfer_params": _no({}),
    "vllm_xargs": _no({}),
    "thinking_token_budget": _use(("reasoning_effort", "reasoning.effort")),
    "prompt_embeds": _use("prompt"),
    "chat_template": _say("is the server's; start it with --chat-template, or use chat_template_kwargs"),
    "repetition_detection": _use("repetition_penalty"),
    "data_parallel_rank": _no(),
    "return_prompt_text": _use("echo", False),
    # SGLang
    "regex": _use("structured_outputs.regex"),
    "ebnf": _use("structured_outputs.grammar"),
    "max_new_tokens": _use(_LIMIT),
    "min_new_tokens": _use("min_tokens"),
    "stop_regex": _use("stop", []),
    "no_stop_trim": _use("include_stop_str_in_output", False),
    "lora_path": _use("model, with the adapter's name"),
    "session_params": _no(),
    "custom_logit_processor": _use("logit_bias"),
    "custom_params": _no(),
    "separate_reasoning": _say("is the server's; start it with --reasoning-parser", True),
    "stream_reasoning": _use("include_reasoning", True),
    "return_hidden_states": _say("is not supported; /v1/embeddings gives one vector", False),
    "return_routed_experts": _no(False),
    "return_logprob": _use("logprobs", False),
    "top_logprobs_num": _use("top_logprobs", 0),
    "logprob_start_len": _use("prompt_logprobs", -1),
    "input_ids": _use(("prompt", "input")),
    "sampling_params": _say("is not a field here; send its entries themselves, such as temperature", {}),
    "rid": _use("request_id"),
    # llama.cpp
    "n_predict": _use(_LIMIT),
    "n_probs": _use("logprobs", 0),
    "n_keep": _use("truncate_prompt_tokens", 0),
    "n_discard": _no(0),
    "n_indent": _no(0),
    "min_keep": _no(0),
    "repeat_penalty": _use("repetition_penalty", 1, 1.0),
    "repeat_last_n": _say("is not supported: penalties look at the whole text; leave it out"),
    "penalty_last_n": _say("is not supported: penalties look at the whole text; leave it out"),
    "penalize_nl": _no(False),
    "grammar": _use("structured_outputs.grammar", ""),
    "grammar_lazy": _no(False),
    "json_schema": _use(("structured_outputs.json", "text.format")),
    "typical_p": _use("top_p or min_p", 1, 1.0),
    "tfs_z": _use("top_p or min_p", 1, 1.0),
    "top_n_sigma": _use("min_p", -1, -1.0, *_OFF),
    "xtc_probability": _no(*_OFF),
    "xtc_threshold": _no(0.1, *_OFF),
    "mirostat": _no(*_OFF),
    "mirostat_tau": _no(5, 5.0),
    "mirostat_eta": _no(0.1),
    "dynatemp_range": _use("temperature", *_OFF),
    "dynatemp_exponent": _use("temperature", 1, 1.0),
    "dry_multiplier": _use("repetition_penalty", *_OFF),
    "dry_base": _use("repetition_penalty", 1.75),
    "dry_allowed_length": _use("repetition_penalty", 2),
    "dry_penalty_last_n": _use("repetition_penalty", -1),
    "dry_sequence_breakers": _use("repetition_penalty"),
    "adaptive_target": _no(-1, -1.0),
    "samplers": _no([]),
    "cache_prompt": _say("is the server's; start it with --no-enable-prefix-caching, or use cache_salt", True),
    "id_slot": _no(-1),
    "t_max_predict_ms": _use(_LIMIT, *_OFF, -1),
    "post_sampling_probs": _no(False),
    "return_tokens": _use("return_token_ids", False),
    "timings_per_token": _say("is not supported; /metrics has timings", False),
    "return_progress": _no(False),
    "response_fields": _no([]),
    "lora": _use("model, with the adapter's name", []),
    "image_data": _no([]),
    "reasoning_format": _say("is the server's; start it with --reasoning-parser", "auto"),
    "thinking_forced_open": _say("is the server's; start it with --reasoning-parser", False),
    "parse_tool_calls": _say("is the server's; start it with --tool-call-parser", True),
    "input_prefix": _use("prompt", ""),
    "input_suffix": _use("prompt", ""),
    # Ollama
    "options": _say("is not a field here; send its entries themselves, such as temperature", {}),
    "format": _use(("response_format", "text.format")),
    "think": _use(("chat_template_kwargs, as {'enable_thinking': false}", "reasoning.effort", "thinking")),
    "raw": _say("is not supported; /v1/completions takes a plain prompt", False),
    "template": _say("is the server's; start it with --chat-template"),
    "system": _use(("messages, one with the role system", "instructions"), ""),
    "context": _use("prompt", []),
    "images": _no([]),
    "num_predict": _use(_LIMIT),
    "num_ctx": _say("is the server's; start it with --max-model-len"),
    "num_keep": _use("truncate_prompt_tokens", 0),
    "num_batch": _say("is the server's; start it with --max-num-batched-tokens"),
    "num_gpu": _say("is the server's; start it with --mesh"),
    # what one API calls otherwise than another
    "max_tokens": _use("max_output_tokens"),
    "max_completion_tokens": _use(_LIMIT),
    "stop_sequences": _use("stop", []),
    "response_format": _use("text.format"),
    "reasoning_effort": _use("reasoning.effort"),
}
