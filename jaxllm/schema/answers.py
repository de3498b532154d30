"""Answers as the OpenAPI document shows them. The routes build plain dicts; the API fuzzer holds them against this."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
_EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "With stream: chunks, then [DONE]."}}}


class Answer(BaseModel):
    """Nothing comes that is not listed."""

    model_config = ConfigDict(extra="forbid")


class PromptDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: Count


class CompletionDetails(Answer):
    """Of the answer's tokens."""

    reasoning_tokens: Count


class Usage(Answer):
    """Tokens of one request."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class PromptLogprob(Answer):
    """A token at one place of the prompt; `rank` 1 is the likeliest."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(Answer):
    """Lists of one length, an entry per token; null for a prompt's first token, before which nothing stands."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class CompletionChoice(Answer):
    """One completion of one prompt."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[Count] = Field(default_factory=list)
    prompt_token_ids: list[Count] = Field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    """Of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    kv_transfer_params: dict[str, Any] | None = None


class CalledFunction(Answer):
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


class AnsweredCall(Answer):
    """A call the model made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[AnsweredCall] = Field(default_factory=list)


class TokenLogprob(Answer):
    """One token; `bytes` tell parts of characters apart."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChatToken(TokenLogprob):
    """The token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """An entry per token."""

    content: list[ChatToken]
    refusal: None


class ChatChoice(Answer):
    """One answer."""

    index: Count
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[Count] = Field(default_factory=list)


class ChatCompletion(Answer):
    """Of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[Count] = Field(default_factory=list)
    kv_transfer_params: dict[str, Any] | None = None


class ResponseAnswer(BaseModel):
    """Of `POST /v1/responses`; more fields as OpenAI's client reads them."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class MessageUsage(Answer):
    """Tokens as Anthropic counts them: cached ones beside the others."""

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    output_tokens: Count


class MessageAnswer(Answer):
    """Of `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    """Of `POST /v1/messages/count_tokens`."""

    input_tokens: Count


class Embedding(Answer):
    """One vector, or its float32 values in base64."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens of the inputs."""

    prompt_tokens: Count
    total_tokens: Count


class Embeddings(Answer):
    """Of `POST /v1/embeddings`."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Tokenized(Answer):
    """Of `POST /tokenize`."""

    tokens: list[Count]
    count: Count
    max_model_len: Count
    token_strs: list[str] = Field(default_factory=list)


class Detokenized(Answer):
    """Of `POST /detokenize`."""

    prompt: str


class JudgeUsage(Answer):
    """Of routes that generate nothing."""

    prompt_tokens: Count
    total_tokens: Count
    completion_tokens: Literal[0]


class OneClass(Answer):
    """One input's label."""

    index: Count
    label: str
    probs: list[float]
    num_classes: Count


class Classes(Answer):
    """Of `POST /classify`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[OneClass]
    usage: JudgeUsage


class OneScore(Answer):
    """One pair's score."""

    index: Count
    object: Literal["score"]
    score: float


class Scores(Answer):
    """Of `POST /score`."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[OneScore]
    usage: JudgeUsage


class RankedText(Answer):
    """A document that was ranked."""

    text: str


class Ranked(Answer):
    """One document's place."""

    index: Count
    relevance_score: float
    document: RankedText | None = None


class Ranking(Answer):
    """Of `POST /rerank`, best first."""

    id: str
    created: int
    model: str
    results: list[Ranked]
    usage: JudgeUsage


class ModelCard(Answer):
    """One name the server answers to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None = None
    max_model_len: Count | None
    vocab_size: Count | None
    state: Literal["absent", "loading", "ready", "draining", "failed"]
    place: Literal["device", "host", "disk"] | None = None


class ModelList(Answer):
    """Of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


def answered(model: type[BaseModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a route's `responses` says of 200."""
    return {200: {"model": model} | ({"content": _EVENTS} if streams else {})}
