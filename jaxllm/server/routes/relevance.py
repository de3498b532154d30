"""`POST /classify`, `/score`, `/rerank` (also under `/v1`): texts judged, in vLLM's, Jina's and Cohere's shapes."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from jaxllm.schema.answers import Classes, Ranking, Scores, answered
from jaxllm.schema.requests import ClassifyRequest, RerankRequest, ScoreRequest
from jaxllm.server.context import Context, model_context, request_id_of
from jaxllm.server.routes.completions import as_prompts
from jaxllm.server.streaming import unless_disconnected

router = APIRouter()


@router.post("/v1/classify", responses=answered(Classes), include_in_schema=False)
@router.post("/classify", responses=answered(Classes))
async def classify(body: ClassifyRequest, request: Request) -> Response:
    """The label of each input, and how likely each label is."""
    ctx, model = await model_context(request, body.model)
    judged = ctx.llm.classify(
        as_prompts(body.input), use_activation=body.use_activation is not False, lora_request=ctx.adapter
    )
    outputs = await unless_disconnected(request, judged)
    data = [
        {"index": i, "label": o.outputs.label, "probs": o.outputs.probs, "num_classes": o.outputs.num_classes}
        for i, o in enumerate(outputs)
    ]
    return _answer(ctx, "classify", request, model, outputs, {"object": "list", "data": data})


@router.post("/v1/score", responses=answered(Scores), include_in_schema=False)
@router.post("/score", responses=answered(Scores))
async def score(body: ScoreRequest, request: Request) -> Response:
    """How well each text answers its query, or the one query."""
    ctx, model = await model_context(request, body.model)
    judged = ctx.llm.score(body.text_1, body.text_2, instruction=body.instruction, lora_request=ctx.adapter)
    outputs = await unless_disconnected(request, judged)
    data = [{"index": i, "object": "score", "score": o.outputs.score} for i, o in enumerate(outputs)]
    return _answer(ctx, "score", request, model, outputs, {"object": "list", "data": data})


@router.post("/v1/rerank", responses=answered(Ranking), include_in_schema=False)
@router.post("/v2/rerank", responses=answered(Ranking), include_in_schema=False)
@router.post("/rerank", responses=answered(Ranking))
async def rerank(body: RerankRequest, request: Request) -> Response:
    """Documents in the order of how well they answer a query."""
    ctx, model = await model_context(request, body.model)
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    judged = ctx.llm.score(body.query, texts, instruction=body.instruction, lora_request=ctx.adapter)
    outputs = await unless_disconnected(request, judged)
    order = sorted(range(len(texts)), key=lambda i: -outputs[i].outputs.score)[: body.top_n or None]
    results = [{"index": i, "relevance_score": outputs[i].outputs.score} for i in order]
    if body.return_documents is not False:
        results = [result | {"document": {"text": texts[result["index"]]}} for result in results]
    return _answer(ctx, "rerank", request, model, outputs, {"results": results})


def _answer(ctx: Context, kind: str, request: Request, model: str, outputs: list[Any], own: dict[str, Any]) -> Response:
    count = sum(len(output.prompt_token_ids) for output in outputs)
    ctx.metrics.prompt_tokens.inc(count)
    head = {"id": f"{kind}-{request_id_of(request)}", "created": int(time.time()), "model": model}
    usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
    return JSONResponse(head | own | {"usage": usage})
