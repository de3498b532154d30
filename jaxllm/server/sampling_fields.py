"""Request fields -> `SamplingParams`, over the model's own defaults."""

from __future__ import annotations

from typing import Any

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.schema.fields import GenerationFields, ResponseFormat, SamplingFields
from jaxllm.server.context import Context
from jaxllm.server.errors import ApiError

_SAME = (
    "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty n seed stop stop_token_ids "
    "ignore_eos min_tokens skip_special_tokens include_stop_str_in_output bad_words allowed_token_ids "
    "truncate_prompt_tokens prompt_logprobs num_speculative_tokens".split()
)


def sampling_params(ctx: Context, body: SamplingFields, **others: Any) -> SamplingParams:
    """The parameters of one request. Raises ValueError or ApiError.

    Args:
        ctx: of the app.
        body: the request.
        **others: fields whose meaning depends on the route (`max_tokens`, `logprobs`, ...).
    """
    if isinstance(body, GenerationFields):
        _check_stream(body)
    given = {name: value for name in _SAME if (value := getattr(body, name, None)) is not None}
    if body.logit_bias:
        given["logit_bias"] = {int(token): value for token, value in body.logit_bias.items()}
    form = structured(body)
    if form is not None:
        others.setdefault("structured_outputs", form)
    return SamplingParams(**{**ctx.llm.generation_defaults(), **given, **others})


def _check_stream(body: GenerationFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options needs stream: true; set it or leave stream_options out", param="stream_options"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise ApiError(400, "prompt_logprobs are not streamed; leave stream out", param="prompt_logprobs")


def structured(body: SamplingFields) -> StructuredOutputs | None:
    """The form asked for by `structured_outputs` or `response_format`."""
    by_format = of_response_format(body.response_format) if isinstance(body, GenerationFields) else None
    if body.structured_outputs is None:
        return by_format
    if by_format is not None:
        raise ApiError(400, "set response_format or structured_outputs, not both", param="response_format")
    return StructuredOutputs(**body.structured_outputs.model_dump(by_alias=True, exclude_none=True))


def of_response_format(wanted: ResponseFormat | None) -> StructuredOutputs | None:
    """OpenAI's `response_format` as a constraint."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return StructuredOutputs(json_object=True)
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(400, "response_format has no json_schema.schema; put the schema there", param="response_format")
    return StructuredOutputs(json=wanted.json_schema.schema_)


def prompt_extras(body: SamplingFields) -> dict[str, Any]:
    """What a prompt carries beside its text: its priority, the salt of its cached prefixes, where its pages are."""
    extras: dict[str, Any] = {"priority": body.priority or 0}
    if isinstance(body, GenerationFields) and body.kv_transfer_params:
        extras["kv_transfer_params"] = body.kv_transfer_params
    return extras | ({"cache_salt": body.cache_salt} if body.cache_salt else {})


def continuous(body: GenerationFields) -> bool:
    """Whether every chunk of a stream carries the usage so far."""
    return body.stream_options is not None and bool(body.stream_options.continuous_usage_stats)


def final_usage(body: GenerationFields) -> bool:
    """Whether a stream ends with a chunk of usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)
