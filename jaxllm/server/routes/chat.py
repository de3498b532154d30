"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.outputs import CompletionDelta, CompletionOutput
from jaxllm.server.context import Context, context_of, request_id_of
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Generation
from jaxllm.server.parsing.chat_shapes import Deltas, message
from jaxllm.server.parsing.events import Parser, collect
from jaxllm.server.parsing.forced import forced_schema, tools_of
from jaxllm.server.schema.answers import ChatCompletion, answered
from jaxllm.server.schema.logprobs import chat_logprobs
from jaxllm.server.schema.requests import ChatMessage, ChatRequest
from jaxllm.server.schema.sampling_fields import prompt_extras, sampling_params
from jaxllm.server.streaming import DONE, EventStream, event, unless_disconnected

router = APIRouter()


@router.post("/v1/chat/completions", responses=answered(ChatCompletion, streams=True))
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    ctx = context_of(request)
    model = ctx.check_model(body.model)
    call = _Call(ctx, body, model, f"chatcmpl-{request_id_of(request)}")
    if body.stream:
        generation = await call.start()
        return EventStream(call.events(generation), generation.close)
    return JSONResponse(await unless_disconnected(request, call.answer()))


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates take them."""
    return [message.model_dump(exclude_none=True) for message in messages]


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: ChatRequest, model: str, name: str):
        self._ctx, self._body, self._name, self._model = ctx, body, name, model
        self._created = int(time.time())
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true; set it", param="top_logprobs")
        self._tools = [] if body.tool_choice == "none" else (body.tools or [])
        self._forced = forced_schema(body.tools or [], body.tool_choice)
        self._params = self._sampling()

    def _sampling(self) -> SamplingParams:
        body = self._body
        others: dict[str, Any] = {"max_tokens": body.max_completion_tokens or body.max_tokens}
        others["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        if self._forced is not None:
            others["structured_outputs"] = self._forced
        return sampling_params(self._ctx, body, **others)

    async def start(self) -> Generation:
        prompt = await self._ctx.llm.in_thread(self._render)
        prompts, streamed = [prompt | prompt_extras(self._body)], bool(self._body.stream)
        return await Generation.open(self._ctx, prompts, self._params, self._name, streamed=streamed)

    def _render(self) -> dict[str, Any]:
        """The conversation through the model's template; only variables it may know get in."""
        body, tokenizer = self._body, self._ctx.llm.get_tokenizer()
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        return tokenizer.chat_prompt(
            plain_messages(body.messages),
            tools=[tool.model_dump(exclude_none=True) for tool in self._tools] or None,
            add_generation_prompt=body.add_generation_prompt,
            chat_template_kwargs=variables,
        )

    def _parser(self, generation: Generation) -> Parser:
        answers, tools = self._ctx.answer_format, tools_of(self._tools)
        if self._forced is not None:
            return answers.forced_parser(tools)
        return answers.parser(tools, generation.outputs[0].prompt or "", self._params)

    async def answer(self) -> dict[str, Any]:
        generation = await self.start()
        (completions,) = await generation.collect()
        choices = [self._choice(one, self._parser(generation)) for one in completions]
        return self._head("chat.completion") | {"choices": choices, "usage": generation.usage()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._name, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, completion: CompletionOutput, parser: Parser) -> dict[str, Any]:
        answer = collect(parser.feed(completion.text) + parser.finish())
        return {
            "index": completion.index,
            "message": message(answer),
            "logprobs": self._logprobs(completion),
            "finish_reason": _finish_reason(completion.finish_reason, bool(answer.calls)),
            "stop_reason": completion.stop_reason,
        } | ({"token_ids": completion.token_ids} if self._body.return_token_ids else {})

    def _logprobs(self, part: CompletionOutput | CompletionDelta) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        token_bytes = self._ctx.llm.get_tokenizer().token_bytes
        return chat_logprobs(part.token_ids, part.logprobs or [], self._body.top_logprobs or 0, token_bytes)

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The stream: the role, deltas, finish reasons, an optional usage chunk, the end."""
        head = self._head("chat.completion.chunk")
        writers = [_Writer(index, self._parser(generation)) for index in range(self._params.n)]
        first = {"role": "assistant", "content": ""}
        roles = [_shaped(index, first, None) for index in range(self._params.n)]
        yield b"".join(event(head | {"choices": [choice]}) for choice in roles)
        async for news in generation:
            choices = []
            for _, delta in news:
                choices += writers[delta.index].choices(delta, self._logprobs(delta))
            if choices:
                yield b"".join(event(head | {"choices": [choice]}) for choice in choices)
        options, tail = self._body.stream_options, b""
        if options and options.include_usage:
            tail = event(head | {"choices": [], "usage": generation.usage()})
        yield tail + DONE


class _Writer:
    """Turns one completion's deltas into choices of chunks."""

    def __init__(self, index: int, parser: Parser):
        self._index, self._parser, self._deltas = index, parser, Deltas()

    def choices(self, delta: CompletionDelta, logprobs: dict[str, Any] | None) -> list[dict[str, Any]]:
        news = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            news += self._parser.finish()
        deltas = self._deltas.of(news)
        if not deltas and (logprobs is not None and logprobs["content"]):
            deltas = [{"content": ""}]
        choices = [_shaped(self._index, one, None) for one in deltas]
        if choices:
            choices[0]["logprobs"] = logprobs
        if delta.finish_reason is not None:
            reason = _finish_reason(delta.finish_reason, self._deltas.num_calls > 0)
            choices.append(_shaped(self._index, {}, reason) | {"stop_reason": delta.stop_reason})
        return choices


def _shaped(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _finish_reason(reason: str | None, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and reason == "stop" else reason
