"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.schema.answers import Detokenized, Tokenized, answered
from jaxllm.schema.requests import DetokenizeRequest, TokenizeRequest
from jaxllm.server.context import Context, model_context
from jaxllm.server.errors import ApiError
from jaxllm.server.routes.chat import plain_messages, template_arguments

router = APIRouter()


@router.post("/tokenize", responses=answered(Tokenized))
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text or of a conversation."""
    ctx, _ = await model_context(request, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt (a text) or messages (a conversation)")
    tokenizer = ctx.llm.get_tokenizer()

    def work() -> list[int]:
        if body.messages is None:
            return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []]
        prompt = tokenizer.chat_prompt(
            plain_messages(body.messages),
            tools=tools or None,
            chat_template_kwargs=body.chat_template_kwargs,
            **template_arguments(body),
        )
        return prompt["prompt_token_ids"]

    ids = await ctx.llm.in_thread(work)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": max_model_len(ctx)}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(i) for i in ids]
    return JSONResponse(answer)


@router.post("/detokenize", responses=answered(Detokenized))
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids."""
    ctx, _ = await model_context(request, body.model)
    vocab = ctx.llm.model_config.vocab_size
    if bad := [token for token in body.tokens if token >= vocab]:
        raise ApiError(
            400, f"token id {bad[0]} is outside the vocabulary; ids must be in 0..{vocab - 1}", param="tokens"
        )
    text = await ctx.llm.in_thread(ctx.llm.get_tokenizer().decode, body.tokens)
    return JSONResponse({"prompt": text})


def max_model_len(ctx: Context) -> int:
    """Tokens of the longest possible request."""
    return ctx.llm.engine.runner.shapes.max_model_len
