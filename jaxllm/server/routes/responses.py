"""`POST /v1/responses`: OpenAI's newer API, with tools, reasoning and a bounded memory of its answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.schema.answers import ResponseAnswer, answered
from jaxllm.schema.fields import JsonSchema, ResponseFormat
from jaxllm.schema.responses_request import ResponsesRequest
from jaxllm.schema.tools import Tool
from jaxllm.server.context import Context, context_of
from jaxllm.server.conversation import Conversation, Turn
from jaxllm.server.errors import ApiError
from jaxllm.server.forced import ToolUse
from jaxllm.server.generation import Generation
from jaxllm.server.respond import respond
from jaxllm.server.response_store import StoredResponse
from jaxllm.server.responses_items import ItemWriter, messages_of
from jaxllm.server.sampling_fields import of_response_format, prompt_extras, sampling_params
from jaxllm.server.streaming import event

router = APIRouter()
_ELSEWHERE = {
    "background": "wait for the answer, or use /v1/batches",
    "conversation": "use previous_response_id",
    "prompt": "use input",
    "top_logprobs": "use /v1/chat/completions",
}


@router.post("/v1/responses", responses=answered(ResponseAnswer, streams=True))
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer an input."""
    return await respond(request, body, _Call)


@router.get("/v1/responses/{response_id}")
async def stored_response(response_id: str, request: Request) -> Response:
    """An answer that was stored."""
    return JSONResponse(context_of(request).responses.get(response_id).answer)


@router.delete("/v1/responses/{response_id}")
async def forget_response(response_id: str, request: Request) -> Response:
    """Forget a stored answer."""
    context_of(request).responses.remove(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: ResponsesRequest, model: str, request_id: str):
        for name, instead in _ELSEWHERE.items():
            if getattr(body, name):
                raise ApiError(400, f"{name} is not supported here; {instead}", param=name)
        self._ctx, self._body, self._model, self._id = ctx, body, model, f"resp_{request_id}"
        self._created = int(time.time())
        self._tools = [_tool(tool.model_dump()) for tool in body.tools or []]
        self._messages = self._history()
        params = sampling_params(ctx, body, max_tokens=body.max_output_tokens, **self._form(), **self._truncation())
        use = ToolUse.chosen(self._tools, body.tool_choice, body.parallel_tool_calls)
        self._turn = Turn(ctx, self._conversation(use), params)

    def _form(self) -> dict[str, Any]:
        wanted = self._body.text.format if self._body.text else None
        if wanted is None or wanted.type == "text":
            return {}
        if self._body.structured_outputs is not None:
            raise ApiError(400, "set text.format or structured_outputs, not both", param="text.format")
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise ApiError(400, "text.format has no schema; put the JSON schema there", param="text.format")
        schema = JsonSchema(schema=wanted.schema_) if wanted.schema_ is not None else None
        return {"structured_outputs": of_response_format(ResponseFormat(type=wanted.type, json_schema=schema))}

    def _truncation(self) -> dict[str, Any]:
        return {"truncate_prompt_tokens": -1} if self._body.truncation == "auto" else {}

    def _history(self) -> list[dict[str, Any]]:
        """The conversation so far and the request's own input, without its instructions."""
        body, store = self._body, self._ctx.responses
        before = store.get(body.previous_response_id).messages if body.previous_response_id else []
        if isinstance(body.input, str):
            return [*before, {"role": "user", "content": body.input}]
        return [*before, *messages_of(body.input, store.items)]

    def _conversation(self, use: ToolUse) -> Conversation:
        body = self._body
        effort = body.reasoning.effort if body.reasoning else None
        first = [{"role": "system", "content": body.instructions}] if body.instructions else []
        return Conversation(
            messages=[*first, *self._messages],
            use=use,
            extras=prompt_extras(body),
            variables={"reasoning_effort": effort} if effort else {},
        )

    async def start(self) -> Generation:
        return await self._turn.open(self._id, streamed=bool(self._body.stream))

    async def answer(self, generation: Generation) -> dict[str, Any]:
        ((completion,),) = await generation.collect()
        writer, parser = ItemWriter(lambda *_, **__: b""), self._turn.parser(generation)
        for _ in writer.write(parser.feed(completion.text) + parser.finish()):
            pass
        return self._finished(generation, writer, completion.finish_reason)

    def _finished(self, generation: Generation, writer: ItemWriter, reason: str | None) -> dict[str, Any]:
        for _ in writer.finish(complete=reason != "length"):
            pass
        status = "incomplete" if reason == "length" else "completed"
        answer = self._shaped(status, writer.items, self._usage(generation, writer.items))
        if self._body.store is not False:
            messages = [*self._messages, *messages_of(writer.items, {})]
            self._ctx.responses.add(self._id, StoredResponse(answer, messages))
        return answer

    def _shaped(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body, params = self._body, self._turn.params
        choice, text = body.tool_choice, body.text
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": params.max_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
            "temperature": params.temperature,
            "text": text.model_dump(by_alias=True, exclude_none=True) if text else {"format": {"type": "text"}},
            "tool_choice": (choice or "auto") if not choice or isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
            "usage": usage,
        }

    def _usage(self, generation: Generation, items: list[dict[str, Any]]) -> dict[str, Any]:
        thoughts = "".join(item["content"][0]["text"] for item in items if item["type"] == "reasoning")
        usage = generation.usage(self._turn.num_tokens(thoughts))
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """OpenAI's sequence of events: the response, its items as they grow, the response as it ended."""
        numbers = itertools.count()

        def send(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        started = self._shaped("in_progress", [], None)
        yield send("response.created", response=started) + send("response.in_progress", response=started)
        writer, parser, reason = ItemWriter(send), self._turn.parser(generation), None
        async for news in generation:
            pieces = []
            for _, delta in news:
                pieces += writer.write(parser.feed(delta.text))
                reason = delta.finish_reason or reason
            if pieces:
                yield b"".join(pieces)
        tail = [*writer.write(parser.finish()), *writer.finish(complete=reason != "length")]
        whole = self._finished(generation, writer, reason)
        yield b"".join(tail) + send(f"response.{whole['status']}", response=whole)


def _tool(given: dict[str, Any]) -> Tool:
    kind = given.pop("type")
    return Tool.model_validate({"type": kind, "function": given})
