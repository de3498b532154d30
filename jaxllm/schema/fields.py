"""Fields that several requests share, every one bounded: texts, token ids, sampling, the form of an answer.

Names and meanings are OpenAI's and vLLM's. Nothing here knows a route.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from jaxllm.config.sampling import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from jaxllm.schema.schema_rules import NULL, absent, check_names, either, exactly_one, given, only, rules

MAX_PROMPTS = 1024
_MAX_DIGITS = 40


T = TypeVar("T")


def _as_number(value: Any) -> Any:
    """The number that a text is, as lenient servers take it; whole where it has no fraction."""
    if isinstance(value, str) and len(value) <= _MAX_DIGITS:
        for kind in (int, float):
            try:
                value = kind(value)
                break
            except ValueError:
                continue
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


Lenient = Annotated[T, BeforeValidator(_as_number)]
_TEXT = 8 << 20
Text = Annotated[str, StringConstraints(max_length=_TEXT)]
Name = Annotated[str, StringConstraints(max_length=256)]
Token = Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"x-token": True})]  # openapi.py adds the vocabulary
Tokens = Annotated[list[Token], Field(min_length=1, max_length=2**20, fail_fast=True)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
# An empty schema says nothing of what a grammar compiler takes; these formats and examples do.
Regex = Annotated[Text, Field(json_schema_extra={"format": "regex"}, examples=["[a-z]+", "(yes|no)"])]
Grammar = Annotated[
    Text, Field(description="Lark with a `start` rule, or GBNF with a `root`.", examples=['start: "yes" | "no"'])
]
Schema = Annotated[dict[str, Any], Field(description="A JSON schema.", examples=[{"type": "object"}])]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]

TokenText = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Bias = Lenient[Annotated[float, Field(ge=-100, le=100)]]
_CLOSED: JsonDict = {"additionalProperties": False}
UNSUPPORTED = {"description": "Not supported."}


class Model(BaseModel):
    """Strict: a number in quotes is text, and NaN is no number."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=(), populate_by_name=True)


class Body(Model):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, body: Any) -> Any:
        return check_names(body, cls.model_fields)


class StreamOptions(Model):
    """What a stream carries beside its choices."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredFields(Model):
    """vLLM's `structured_outputs`: exactly one of these."""

    model_config = rules(
        exactly_one(
            json={"type": ["object", "string"]},
            json_object={"const": True},
            regex={"type": "string"},
            choice={"type": "array"},
            grammar={"type": "string"},
        )
    )

    json_: Schema | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    choice: (
        Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=MAX_CHOICES),
        ]
        | None
    ) = None
    grammar: Grammar | None = None


class JsonSchema(Model):
    """The schema of `response_format`."""

    name: Name | None = None
    description: Text | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    """OpenAI's `response_format`."""

    model_config = rules(
        either(only(type={"enum": ["text", "json_object"]}), given(json_schema=given(schema={"type": "object"})))
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


_FREE_FORM = either(NULL, given(type={"const": "text"}))
STREAM_RULES = (
    either(absent("prompt_logprobs"), only(stream={"enum": [False, None]})),
    either(absent("stream_options"), given(stream={"const": True})),
    either(absent("structured_outputs"), only(response_format=_FREE_FORM)),
)


_KEEP_ALIVE = {"type": "null", "description": "As in ollama, for servers of several models: '10m', seconds or -1."}


class SamplingFields(Body):
    """What every generating route takes, whatever its API."""

    model: Name | None = None
    temperature: Lenient[Annotated[float, Field(ge=0, le=100)]] | None = None
    top_p: Lenient[Annotated[float, Field(ge=1e-9, le=1)]] | None = None
    top_k: Lenient[Annotated[int, Field(ge=-1, lt=2**31)]] | None = None
    min_p: Lenient[Annotated[float, Field(ge=0, le=1)]] | None = None
    presence_penalty: Lenient[Annotated[float, Field(ge=-2, le=2)]] | None = None
    frequency_penalty: Lenient[Annotated[float, Field(ge=-2, le=2)]] | None = None
    repetition_penalty: Lenient[Annotated[float, Field(ge=0.01, le=100)]] | None = None
    seed: Lenient[Annotated[int, Field(ge=-(2**63), lt=2**64)]] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Lenient[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    logit_bias: Annotated[dict[TokenText, Bias], Field(max_length=MAX_LOGIT_BIAS, json_schema_extra=_CLOSED)] | None = (
        None
    )
    bad_words: Annotated[list[StopText], Field(max_length=MAX_BAD_WORDS)] | None = None
    allowed_token_ids: Annotated[list[Token], Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    truncate_prompt_tokens: Lenient[Annotated[int, Field(ge=-1, lt=2**31)]] | None = None
    num_speculative_tokens: Lenient[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    structured_outputs: StructuredFields | None = None
    priority: Lenient[Annotated[int, Field(ge=-1000, le=1000)]] | None = None
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    request_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")] | None = None
    user: Name | None = None
    keep_alive: Annotated[Name | float, WithJsonSchema(_KEEP_ALIVE)] | None = None


_TRANSFER = {"type": "object", "maxProperties": 0, "description": "For servers with --kv-transfer-config."}


class GenerationFields(SamplingFields):
    """What completions and chat completions share beside it."""

    n: Lenient[Annotated[int, Field(ge=1, le=MAX_N)]] | None = None
    prompt_logprobs: Lenient[Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]] | None = None
    stream_options: StreamOptions | None = None
    kv_transfer_params: Annotated[dict[Name, Any], Field(max_length=32), WithJsonSchema(_TRANSFER)] | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
