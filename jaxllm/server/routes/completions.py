"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jaxllm.config.sampling import SamplingParams
from jaxllm.engine.outputs import CompletionDelta, CompletionOutput, RequestOutput
from jaxllm.schema.answers import Completion, answered
from jaxllm.schema.logprobs import completion_logprobs, prompt_logprobs
from jaxllm.schema.requests import CompletionRequest
from jaxllm.server.context import Context
from jaxllm.server.errors import ApiError
from jaxllm.server.generation import Generation
from jaxllm.server.respond import respond
from jaxllm.server.sampling_fields import continuous, final_usage, prompt_extras, sampling_params
from jaxllm.server.streaming import DONE, event

router = APIRouter()


@router.post("/v1/completions", responses=answered(Completion, streams=True))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    return await respond(request, body, _Call)


class _Call:
    """One request on its way to an answer."""

    def __init__(self, ctx: Context, body: CompletionRequest, model: str, request_id: str):
        self._ctx, self._body, self._name = ctx, body, f"cmpl-{request_id}"
        self._head = {"id": self._name, "object": "text_completion", "created": int(time.time()), "model": model}
        self._head["system_fingerprint"] = ctx.fingerprint
        if body.suffix:
            raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
        if (body.best_of or 1) > (body.n or 1):
            raise ApiError(400, "best_of above n is not supported; leave it out", param="best_of")
        if body.max_tokens == 0 and not (body.echo and not body.stream):
            raise ApiError(400, "max_tokens is 0; give at least 1, or set echo and no stream", param="max_tokens")
        self._params = self._sampling()

    def _sampling(self) -> SamplingParams:
        body = self._body
        counts = [body.prompt_logprobs, body.logprobs if body.echo else None]
        scores = max((count for count in counts if count is not None), default=None)
        max_tokens = body.max_tokens if body.max_tokens is not None else 16
        return sampling_params(
            self._ctx, body, max_tokens=max(max_tokens, 1), logprobs=body.logprobs, prompt_logprobs=scores
        )

    async def start(self) -> Generation:
        extras = prompt_extras(self._body)
        if self._body.add_special_tokens is not None:
            extras["add_special_tokens"] = self._body.add_special_tokens
        prompts = [extras | prompt for prompt in as_prompts(self._body.prompt)]
        return await Generation.open(self._ctx, prompts, self._params, self._name, streamed=bool(self._body.stream))

    async def answer(self, generation: Generation) -> dict[str, Any]:
        results = await generation.collect()
        if self._body.max_tokens == 0:
            results = [[CompletionOutput(c.index, finish_reason="length") for c in one] for one in results]
            generation.num_generated = 0
        choices = [
            self._choice(generation, prompt, completion)
            for prompt, completions in enumerate(results)
            for completion in completions
        ]
        return self._head | {"choices": choices, "usage": generation.usage()} | generation.handed_over

    def _choice(self, generation: Generation, prompt: int, completion: CompletionOutput) -> dict[str, Any]:
        output, text = generation.outputs[prompt], completion.text
        logprobs = None
        if self._body.echo:
            text = self._prompt_text(output) + text
        if self._body.logprobs is not None:
            ids, entries = completion.token_ids, list(completion.logprobs or [])
            if self._body.echo:
                ids = output.prompt_token_ids + ids
                entries = [*(output.prompt_logprobs or []), *entries]
            logprobs = self._logprobs(ids, entries, 0)
        choice = self._shaped(prompt, completion, text, logprobs)
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _logprobs(self, ids: list[int], entries: list[Any], offset: int) -> dict[str, Any]:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return completion_logprobs(ids, entries, self._body.logprobs or 0, offset, self._token_text, as_ids=as_ids)

    def _shaped(
        self, prompt: int, part: CompletionOutput | CompletionDelta, text: str, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        choice = {
            "index": prompt * self._params.n + part.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        return choice | ({"token_ids": part.token_ids} if self._body.return_token_ids else {})

    def _token_text(self, token: int) -> str:
        return self._ctx.llm.get_tokenizer().token_text(token)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._ctx.llm.get_tokenizer().decode(output.prompt_token_ids)

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The stream: an optional echo, deltas, an optional usage chunk, the end."""
        lengths: dict[tuple[int, int], int] = {}
        async for news in generation:
            pieces = []
            for prompt, delta in news:
                choices = self._delta_choices(generation, prompt, delta, lengths)
                usage = {"usage": generation.usage()} if continuous(self._body) else {}
                pieces += [event(self._head | {"choices": [choice]} | usage) for choice in choices]
            yield b"".join(pieces)
        tail = b""
        if final_usage(self._body):
            tail = event(self._head | {"choices": [], "usage": generation.usage()})
        yield tail + DONE

    def _delta_choices(
        self, generation: Generation, prompt: int, delta: CompletionDelta, lengths: dict[tuple[int, int], int]
    ) -> list[dict[str, Any]]:
        key, count, choices = (prompt, delta.index), self._body.logprobs, []
        if self._body.echo and key not in lengths:
            output = generation.outputs[prompt]
            text = self._prompt_text(output)
            echoed = None
            if count is not None:
                echoed = self._logprobs(output.prompt_token_ids, output.prompt_logprobs or [], 0)
            choices.append(self._shaped(prompt, CompletionDelta(delta.index, "", []), text, echoed))
            lengths[key] = len(text)
        offset = lengths.get(key, 0)
        lengths[key] = offset + len(delta.text)
        logprobs = None
        if count is not None:
            logprobs = self._logprobs(delta.token_ids, delta.logprobs or [], offset)
        if delta.text or delta.token_ids or delta.finish_reason:
            choices.append(self._shaped(prompt, delta, delta.text, logprobs))
        return choices


def as_prompts(prompt: Any) -> list[dict[str, Any]]:
    """The four shapes of OpenAI's `prompt` and `input` as prompts of ours."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    return [{"prompt": p} if isinstance(p, str) else {"prompt_token_ids": p} for p in prompt]
