"""`POST /v1/responses`: OpenAI's newer face, for plain text. Nothing is stored."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.config.sampling import SamplingParams, StructuredOutputs
from jaxllm.server.context import Context, context_of, request_id_of
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Generation
from jaxllm.server.schema.answers import ResponseAnswer, answered
from jaxllm.server.schema.fields import JsonSchema, ResponseFormat
from jaxllm.server.schema.requests import ResponsesRequest
from jaxllm.server.schema.sampling_fields import of_response_format
from jaxllm.server.streaming import EventStream, event, unless_disconnected

router = APIRouter()


@router.post("/v1/responses", responses=answered(ResponseAnswer, streams=True))
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """Answer an input."""
    ctx = context_of(request)
    model = ctx.check_model(body.model)
    for name in ("tools", "previous_response_id", "background"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported here; use /v1/chat/completions", param=name)
    call = _Call(ctx, body, model, request_id_of(request))
    if body.stream:
        generation = await call.start()
        return EventStream(call.events(generation), generation.close)
    return JSONResponse(await unless_disconnected(request, call.answer()))


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: ResponsesRequest, model: str, name: str):
        self._ctx, self._body, self._model = ctx, body, model
        self._id, self._message_id = f"resp_{name}", f"msg_{name}"
        self._created = int(time.time())
        given = {"temperature": body.temperature, "top_p": body.top_p}
        chosen = {key: value for key, value in given.items() if value is not None}
        defaults = ctx.llm.generation_defaults()
        form = self._form()
        limit = body.max_output_tokens
        self._params = SamplingParams(**{**defaults, **chosen}, max_tokens=limit, structured_outputs=form)

    def _form(self) -> StructuredOutputs | None:
        wanted = self._body.text.format if self._body.text else None
        if wanted is None:
            return None
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise ApiError(400, "text.format has no schema; put the JSON schema there", param="text.format")
        schema = JsonSchema(schema=wanted.schema_) if wanted.schema_ is not None else None
        return of_response_format(ResponseFormat(type=wanted.type, json_schema=schema))

    async def start(self) -> Generation:
        prompt = await self._ctx.llm.in_thread(self._render)
        streamed = bool(self._body.stream)
        return await Generation.open(self._ctx, [prompt], self._params, self._id, streamed=streamed)

    def _render(self) -> dict[str, Any]:
        body, tokenizer = self._body, self._ctx.llm.get_tokenizer()
        messages: list[dict[str, Any]] = []
        if body.instructions:
            messages.append({"role": "system", "content": body.instructions})
        if isinstance(body.input, str):
            messages.append({"role": "user", "content": body.input})
        else:
            messages += [{"role": item.role, "content": _text_of(item.content)} for item in body.input]
        return tokenizer.chat_prompt(messages)

    async def answer(self) -> dict[str, Any]:
        generation = await self.start()
        ((completion,),) = await generation.collect()
        return self._shaped(generation, completion.text, completion.finish_reason)

    def _shaped(self, generation: Generation | None, text: str | None, reason: str | None) -> dict[str, Any]:
        complete = reason != "length"
        status = "in_progress" if text is None else "completed" if complete else "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "instructions": self._body.instructions,
            "max_output_tokens": self._params.max_tokens,
            "metadata": self._body.metadata or {},
            "model": self._model,
            "output": [] if text is None else [self._message(text, status)],
            "parallel_tool_calls": False,
            "temperature": self._params.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": self._params.top_p,
            "usage": None if generation is None else _usage(generation),
        }

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        head = {"type": "message", "id": self._message_id, "status": status}
        return head | {"role": "assistant", "content": content}

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """OpenAI's sequence of events for one message of text."""
        numbers = itertools.count()
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}

        def send(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

        started = self._shaped(None, None, None)
        yield (
            send("response.created", response=started)
            + send("response.in_progress", response=started)
            + send("response.output_item.added", output_index=0, item=self._message(None, "in_progress"))
            + send("response.content_part.added", **where, part=_part(""))
        )
        text, reason = "", None
        async for news in generation:
            for _, delta in news:
                text, reason = text + delta.text, delta.finish_reason or reason
                if delta.text:
                    yield send("response.output_text.delta", **where, delta=delta.text, logprobs=[])
        whole = self._shaped(generation, text, reason)
        yield (
            send("response.output_text.done", **where, text=text, logprobs=[])
            + send("response.content_part.done", **where, part=_part(text))
            + send("response.output_item.done", output_index=0, item=whole["output"][0])
            + send(f"response.{whole['status']}", response=whole)
        )


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in ("input_text", "output_text", "text") or part.text is None:
            raise ApiError(400, f"content of type {part.type[:50]!r} is not supported; only text is", param="input")
    return "\n".join(part.text for part in content)


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
