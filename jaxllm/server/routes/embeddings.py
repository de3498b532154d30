"""`POST /v1/embeddings`: final-norm hidden states, averaged or of the last token, at unit length."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.engine.scoring import Scorer
from jaxllm.schema.answers import Embeddings, answered
from jaxllm.schema.requests import EmbeddingRequest
from jaxllm.server.context import Context, model_context
from jaxllm.server.errors import ApiError
from jaxllm.server.routes.completions import as_prompts
from jaxllm.server.streaming import unless_disconnected

router = APIRouter()


@router.post("/v1/embeddings", responses=answered(Embeddings))
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """One vector per input."""
    ctx, model = await model_context(request, body.model)
    if body.dimensions not in (None, ctx.llm.model_config.hidden_size):
        size = ctx.llm.model_config.hidden_size
        raise ApiError(
            400, f"dimensions is {body.dimensions}, but this model has {size}; leave it out", param="dimensions"
        )
    prompts = await ctx.llm.in_thread(_token_ids, ctx, body)
    vectors = await unless_disconnected(request, ctx.llm.embed(prompts, ctx.settings.pooling, lora_request=ctx.adapter))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    count = sum(map(len, prompts))
    ctx.metrics.prompt_tokens.inc(count)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "model": model, "data": data, "usage": usage})


def _token_ids(ctx: Context, body: EmbeddingRequest) -> list[list[int]]:
    scorer, prompts = Scorer(ctx.llm.engine), []
    for prompt in as_prompts(body.input):
        ids = prompt.get("prompt_token_ids")
        prompts.append(ids if ids is not None else ctx.llm.get_tokenizer().encode(prompt["prompt"]))
        scorer.check(prompts[-1])
    return prompts


def _encoded(vector: np.ndarray, encoding: str | None) -> Any:
    values = np.asarray(vector, "<f4")
    return base64.b64encode(values.tobytes()).decode() if encoding == "base64" else values.tolist()
