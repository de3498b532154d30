"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.outputs import CompletionDelta, CompletionOutput
from jaxllm.parsing.chat_shapes import Deltas, message
from jaxllm.parsing.events import Event, Parser, Reasoning
from jaxllm.schema.answers import ChatCompletion, answered
from jaxllm.schema.logprobs import chat_logprobs, prompt_logprobs
from jaxllm.schema.requests import ChatMessage, ChatRequest, TokenizeRequest
from jaxllm.server.context import Context
from jaxllm.server.conversation import Conversation, Turn
from jaxllm.server.errors import ApiError
from jaxllm.server.forced import ToolUse
from jaxllm.server.generation import Generation
from jaxllm.server.respond import respond
from jaxllm.server.sampling_fields import continuous, final_usage, prompt_extras, sampling_params
from jaxllm.server.streaming import DONE, event

router = APIRouter()


@router.post("/v1/chat/completions", responses=answered(ChatCompletion, streams=True))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, body, _Call)


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates take them."""
    return [_plain_message(one.model_dump(exclude_none=True)) for one in messages]


def _plain_message(given: dict[str, Any]) -> dict[str, Any]:
    """A refusal's text is text: that is what the assistant said."""
    if isinstance(parts := given.get("content"), list):
        refused = [{"type": "text", "text": part["refusal"]} if "refusal" in part else part for part in parts]
        return {**given, "content": refused}
    return given


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: ChatRequest, model: str, request_id: str):
        self._ctx, self._body, self._model, self._name = ctx, body, model, f"chatcmpl-{request_id}"
        self._created = int(time.time())
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true; set it", param="top_logprobs")
        self._turn = Turn(ctx, _conversation(body), self._sampling())

    def _sampling(self) -> SamplingParams:
        body = self._body
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return sampling_params(
            self._ctx, body, max_tokens=body.max_completion_tokens or body.max_tokens, logprobs=logprobs
        )

    async def start(self) -> Generation:
        return await self._turn.open(self._name, streamed=bool(self._body.stream))

    async def answer(self, generation: Generation) -> dict[str, Any]:
        (completions,) = await generation.collect()
        read = [self._turn.read(generation, completion) for completion in completions]
        num_reasoning = sum(self._turn.num_tokens(answer.reasoning) for answer in read)
        choices = []
        for completion, answer in zip(completions, read, strict=True):
            if self._body.include_reasoning is False:
                answer.reasoning = ""
            has_calls = bool(answer.calls)
            choices.append(self._choice(completion, has_calls) | {"message": message(answer)})
        whole = self._head("chat.completion") | {"choices": choices, "usage": generation.usage(num_reasoning)}
        return whole | self._of_prompt(generation) | generation.handed_over

    def _of_prompt(self, generation: Generation) -> dict[str, Any]:
        """What was asked for of the prompt's tokens."""
        output, extra = generation.outputs[0], {}
        if self._body.prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            extra["prompt_token_ids"] = output.prompt_token_ids
        return extra

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._name, "object": kind, "created": self._created, "model": self._model}
        return head | {"system_fingerprint": self._ctx.fingerprint}

    def _choice(self, completion: CompletionOutput, has_calls: bool) -> dict[str, Any]:
        return {
            "index": completion.index,
            "logprobs": self._logprobs(completion),
            "finish_reason": _finish_reason(completion.finish_reason, has_calls),
            "stop_reason": completion.stop_reason,
        } | ({"token_ids": completion.token_ids} if self._body.return_token_ids else {})

    def _logprobs(self, part: CompletionOutput | CompletionDelta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        token_bytes = self._ctx.llm.get_tokenizer().token_bytes
        return chat_logprobs(
            part.token_ids,
            part.logprobs or [],
            self._body.top_logprobs or 0,
            token_bytes,
            as_ids=bool(self._body.return_tokens_as_token_ids),
        )

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The stream: the role, deltas, finish reasons, an optional usage chunk, the end."""
        body, head = self._body, self._head("chat.completion.chunk")
        writers = [_Writer(index, self._turn.parser(generation), body) for index in range(self._turn.params.n)]

        def chunks(choices: Sequence[dict[str, Any]]) -> bytes:
            usage = {"usage": generation.usage()} if continuous(body) else {}
            return b"".join(event(head | {"choices": [choice]} | usage) for choice in choices)

        first = {"role": "assistant", "content": ""}
        yield chunks([_shaped(index, first, None) for index in range(self._turn.params.n)])
        async for news in generation:
            choices = []
            for _, delta in news:
                choices += writers[delta.index].choices(delta, self._logprobs(delta))
            if choices:
                yield chunks(choices)
        tail = b""
        if final_usage(body):
            num_reasoning = sum(self._turn.num_tokens(writer.reasoning) for writer in writers)
            tail = event(head | {"choices": [], "usage": generation.usage(num_reasoning)})
        yield tail + DONE


def _conversation(body: ChatRequest) -> Conversation:
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.documents is not None:
        variables["documents"] = body.documents
    return Conversation(
        messages=plain_messages(body.messages),
        variables=variables,
        template=template_arguments(body),
        extras=prompt_extras(body),
        use=ToolUse.chosen(body.tools, body.tool_choice, body.parallel_tool_calls),
    )


def template_arguments(body: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """How the prompt ends, as `Tokenizer.chat_prompt` takes it."""
    return {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": bool(body.continue_final_message),
    }


class _Writer:
    """Turns one completion's deltas into choices of chunks."""

    def __init__(self, index: int, parser: Parser, body: ChatRequest):
        self.reasoning = ""
        self._index, self._parser, self._body, self._deltas = index, parser, body, Deltas()

    def choices(self, delta: CompletionDelta, logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
        news = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            news += self._parser.finish()
        deltas = self._deltas.of(self._shown(news))
        if not deltas and (self._body.return_token_ids or (logprobs is not None and logprobs["content"])):
            deltas = [{"content": ""}]
        choices = [_shaped(self._index, one, None) for one in deltas]
        if choices:
            choices[0] |= {"logprobs": logprobs}
            choices[0] |= {"token_ids": delta.token_ids} if self._body.return_token_ids else {}
        if delta.finish_reason is not None:
            reason = _finish_reason(delta.finish_reason, self._deltas.num_calls > 0)
            choices.append(_shaped(self._index, {}, reason) | {"stop_reason": delta.stop_reason})
        return choices

    def _shown(self, news: Sequence[Event]) -> list[Event]:
        self.reasoning += "".join(one.text for one in news if isinstance(one, Reasoning))
        hidden = self._body.include_reasoning is False
        return [one for one in news if not (hidden and isinstance(one, Reasoning))]


def _shaped(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _finish_reason(reason: str | None, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and reason == "stop" else reason
