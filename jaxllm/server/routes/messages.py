"""`POST /v1/messages` and its token count: Anthropic's API over the same conversation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.schema.answers import MessageAnswer, TokenCount, answered
from jaxllm.schema.messages_request import CountTokensRequest, MessagesRequest, Prompted
from jaxllm.schema.tools import FunctionName, NamedTool
from jaxllm.server.context import Context, model_context
from jaxllm.server.conversation import Conversation, Turn
from jaxllm.server.errors import ApiError, as_api_error
from jaxllm.server.forced import Choice, ToolUse
from jaxllm.server.generation import Generation
from jaxllm.server.message_blocks import BlockWriter, messages_of, tools_of
from jaxllm.server.respond import respond
from jaxllm.server.sampling_fields import prompt_extras, sampling_params
from jaxllm.server.streaming import event

router = APIRouter()
_CHOICES: dict[str, Choice] = {"auto": "auto", "any": "required", "none": "none"}


@router.post("/v1/messages", responses=answered(MessageAnswer, streams=True))
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(request, body, _Call, failed=_failed)


@router.post("/v1/messages/count_tokens", responses=answered(TokenCount))
async def count_tokens(body: CountTokensRequest, request: Request) -> Response:
    """How many tokens a conversation has."""
    ctx, _ = await model_context(request, body.model)
    turn = Turn(ctx, _conversation(body), sampling_params(ctx, body, max_tokens=None))
    prompt = await ctx.llm.in_thread(turn.prompt)
    return JSONResponse({"input_tokens": len(prompt["prompt_token_ids"])})


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: MessagesRequest, model: str, request_id: str):
        self._ctx, self._body, self._model, self._id = ctx, body, model, f"msg_{request_id}"
        stops = {"stop": body.stop_sequences} if body.stop_sequences else {}
        self._turn = Turn(ctx, _conversation(body), sampling_params(ctx, body, max_tokens=body.max_tokens, **stops))

    async def start(self) -> Generation:
        return await self._turn.open(self._id, streamed=bool(self._body.stream))

    async def answer(self, generation: Generation) -> dict[str, Any]:
        ((completion,),) = await generation.collect()
        writer, parser = BlockWriter(lambda *_, **__: b""), self._turn.parser(generation)
        for _ in (*writer.write(parser.feed(completion.text) + parser.finish()), *writer.close()):
            pass
        reason = _stop(completion.finish_reason, completion.stop_reason, writer)
        return self._shaped(writer.blocks, reason, _usage(generation))

    def _shaped(self, blocks: list[dict[str, Any]], reason: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return head | {"content": blocks} | reason | {"usage": usage}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The documented sequence: the message, its blocks as they grow, why it ended."""

        def send(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, **fields}, kind)

        nothing = {"stop_reason": None, "stop_sequence": None}
        yield send("message_start", message=self._shaped([], nothing, _usage(generation))) + send("ping")
        writer, parser = BlockWriter(send), self._turn.parser(generation)
        reason, stop = None, None
        async for news in generation:
            pieces = []
            for _, delta in news:
                pieces += writer.write(parser.feed(delta.text))
                reason, stop = delta.finish_reason or reason, delta.stop_reason or stop
            if pieces:
                yield b"".join(pieces)
        tail = [*writer.write(parser.finish()), *writer.close()]
        tail.append(send("message_delta", delta=_stop(reason, stop, writer), usage=_usage(generation)))
        yield b"".join(tail) + send("message_stop")


def _conversation(body: Prompted) -> Conversation:
    return Conversation(
        messages=messages_of(body.system, body.messages),
        use=_use(body),
        variables=_thinking(body),
        extras=prompt_extras(body),
    )


def _use(body: Prompted) -> ToolUse:
    given = body.tool_choice
    tools = tools_of(body.tools)
    if given is None:
        return ToolUse.chosen(tools, "auto")
    if given.type == "tool" and given.name is None:
        raise ApiError(400, "tool_choice names no tool; add its name", param="tool_choice.name")
    named = NamedTool(type="function", function=FunctionName(name=given.name or ""))
    choice = named if given.type == "tool" else _CHOICES[given.type]
    return ToolUse.chosen(tools, choice, False if given.disable_parallel_tool_use else None)


def _thinking(body: Prompted) -> dict[str, Any]:
    """As the variables that templates of thinking models read."""
    return {} if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}


def _stop(reason: str | None, stop: str | int | None, writer: BlockWriter) -> dict[str, Any]:
    if reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": "tool_use" if writer.has_calls else "end_turn", "stop_sequence": None}


def _usage(generation: Generation) -> dict[str, int]:
    usage = generation.usage()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _failed(error: Exception) -> bytes:
    shaped = as_api_error(error).anthropic_body
    return b"event: error\ndata: " + json.dumps(shaped).encode() + b"\n\n"
