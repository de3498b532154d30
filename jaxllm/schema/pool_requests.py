"""Requests that change which models a server has, and where they are."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from jaxllm.schema.fields import Body, Lenient, Name


class DeployRequest(Body):
    """`POST /v1/models/deploy`: what a `[models.NAME]` table of a pool's file says."""

    model: Name
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    aliases: Annotated[list[Name], Field(max_length=64)] | None = None
    pinned: bool | None = None
    keep_alive: Name | float | None = None
    priority: Lenient[Annotated[int, Field(ge=-1000, le=1000)]] | None = None
    max_model_len: Lenient[Annotated[int, Field(ge=1, lt=2**31)]] | None = None
    max_num_seqs: Lenient[Annotated[int, Field(ge=1, lt=2**20)]] | None = None
    quantization: Name | None = None
    lora_modules: Annotated[dict[Name, str], Field(max_length=256, description="Adapters: name and folder.")] | None = (
        None
    )
    engine: Annotated[dict[Name, Any], Field(max_length=64, description="Further engine arguments.")] | None = None
    wait: bool | None = None


class UndeployRequest(Body):
    """`POST /v1/models/undeploy`."""

    model: Name
    wait: bool | None = None


class UpdateWeightsRequest(Body):
    """`POST /update_weights_from_disk`, as SGLang has it; the prefix cache is dropped in any case."""

    model_path: Annotated[str, Field(min_length=1, max_length=4096)]
    model: Name | None = None
    flush_cache: bool | None = None
