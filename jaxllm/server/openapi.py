"""The OpenAPI document of one running server: what FastAPI derives, and what only the served model knows.

Input: FastAPI's document and the app's context. Output: the document with the served names, the vocabulary's bound on
token ids, and the errors' shape in place of FastAPI's own 422.
"""

from __future__ import annotations

from typing import Any

from jaxllm.entrypoints.async_llm import AsyncLLM
from jaxllm.server.context import Context

Schema = dict[str, Any]
_TEXT_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": _TEXT_OR_NULL,
        "code": _TEXT_OR_NULL,
    },
    "additionalProperties": False,
}
_ERRORS = {
    "400": "The request is invalid; the message says how",
    "401": "The API key is missing or wrong",
    "404": "No such model",
    "413": "The body is too large",
    "503": "Full, draining or stuck; see retry-after",
    "default": "Any other error",
}
_NOT_JSON = {"load_lora": "text/plain", "unload_lora": "text/plain", "metrics": "text/plain", "page": "text/html"}


def complete(document: Schema, ctx: Context) -> Schema:
    """`document` itself, changed."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _name_model(document, schemas, ctx)
    _bound_tokens(document, max((llm.model_config.vocab_size for llm in _llms(ctx)), default=1 << 20) - 1)
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "additionalProperties": False,
        "properties": {"error": _ERROR, "type": {"const": "error", "description": "Of Anthropic's routes."}},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            _describe_answers(operation)
    return document


def _llms(ctx: Context) -> list[AsyncLLM]:
    """The frontends that are ready."""
    if ctx.models is None:
        return [ctx.llm]
    return [model.llm for model in ctx.models.pool.models if model.llm is not None]


def _name_model(document: Schema, schemas: Schema, ctx: Context) -> None:
    """The names that are served, the size of embeddings, and whether a prompt may be empty."""
    names = list(ctx.settings.served_model_names)
    if ctx.models is not None:
        names = [name for model in ctx.models.pool.models for name in (model.name, *model.entry.aliases)]
    for schema in schemas.values():
        properties = schema.get("properties", {})
        if schema.get("title", "").endswith("Request") and "model" in properties:
            properties["model"] = {"enum": [*names, None], "default": names[0], "title": "Model"}
        if "dimensions" in properties and ctx.models is None:
            properties["dimensions"] = {"enum": [ctx.llm.model_config.hidden_size, None], "title": "Dimensions"}
    for operation in document["paths"].get("/v1/models/{name}", {}).values():
        operation["parameters"][0]["schema"] = {"enum": names, "title": "Name"}
    if ctx.models is not None:
        return
    tokenizer = ctx.llm.get_tokenizer()
    if tokenizer is None or tokenizer.encode(""):
        return  # something is put before every text
    for name, field in (("CompletionRequest", "prompt"), ("EmbeddingRequest", "input")):
        for choice in schemas[name]["properties"][field]["anyOf"]:
            for text in (choice, choice.get("items", {})):
                if text.get("type") == "string":
                    text["minLength"] = 1


def _bound_tokens(part: Any, largest: int) -> None:
    """Fill in the bound wherever fields.py marks a token id."""
    if isinstance(part, dict):
        if part.pop("x-token", False):
            part.pop("exclusiveMaximum", None)
            part["maximum"] = largest
        for value in part.values():
            _bound_tokens(value, largest)
    elif isinstance(part, list):
        for value in part:
            _bound_tokens(value, largest)


def _describe_answers(operation: Schema) -> None:
    responses, content = (
        operation["responses"],
        {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    )
    responses.pop("422", None)
    for status, description in _ERRORS.items():
        responses[status] = {"description": description, "content": content}
    kind = next((kind for start, kind in _NOT_JSON.items() if operation["operationId"].startswith(start)), None)
    if kind:
        responses["200"]["content"] = {kind: {"schema": {"type": "string"}}}
