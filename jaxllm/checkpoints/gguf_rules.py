"""What becomes of a tensor of a GGUF block: the Hugging Face tensors that are made of it.

A rule is called for the file's tensor `stem.kind` ("attn_q", "weight") of one layer, sees all tensors of the layer
and yields Hugging Face names (below the layer's prefix) with their sources. Knows nothing of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf_sources import (
    Expert,
    Interleaved,
    KeysAndValues,
    OneRow,
    Source,
    Stored,
    Transposed,
    Unrotated,
)

Block = Mapping[str, Stored]  # the file's tensors of one layer, "attn_q.weight" and so on
Made = Iterator[tuple[str, Source]]
Rule = Callable[[Block, str, str, Mapping[str, Any]], Made]


def plain(name: str) -> Rule:
    """The same tensor under another name."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        yield f"{name}.{kind}", block[f"{stem}.{kind}"]

    return rule


def named(name: str, kind: str) -> Rule:
    """A name without a suffix, of a tensor that is always of this kind."""

    def rule(block: Block, stem: str, given: str, config: Mapping[str, Any]) -> Made:
        if given != kind:
            raise CheckpointError(f"tensor '{stem}.{given}' is unknown; expected '{stem}.{kind}'")
        yield name, block[f"{stem}.{kind}"]

    return rule


def unrotated(name: str, heads: str) -> Rule:
    """Rows of queries or keys that the file orders for a rotation of neighbours; `heads` is a config key."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source, count = block[f"{stem}.{kind}"], config[heads]
        if source.shape[0] != count * config["head_dim"]:
            expected = f"{count} heads of {config['head_dim']}"
            raise CheckpointError(f"tensor '{stem}.{kind}' has {source.shape[0]} rows; expected {expected}")
        yield f"{name}.{kind}", Unrotated(source, count)

    return rule


def transposed(name: str) -> Rule:
    """A matrix that Hugging Face keeps as `[in, out]`; its bias is plain."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source = block[f"{stem}.{kind}"]
        yield f"{name}.{kind}", Transposed(source) if len(source.shape) == 2 else source

    return rule


def one_row(name: str) -> Rule:
    """A vector that Hugging Face keeps as a matrix of one row."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source = block[f"{stem}.{kind}"]
        yield f"{name}.{kind}", OneRow(source) if len(source.shape) == 1 else source

    return rule


def experts(name: str, count: str) -> Rule:
    """Matrices of all experts in one tensor; `name` has `{}` for the number, `count` is a config key."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source = _of_experts(block, f"{stem}.{kind}", config[count])
        for number in range(config[count]):
            yield f"{name.format(number)}.{kind}", Expert(source, number)

    return rule


def one_expert(name: str, number: int) -> Rule:
    """One expert's matrix in a tensor of its own, as files of 2023 have it."""
    return plain(name.format(number))


def experts_stacked(name: str, count: str, *partners: str) -> Rule:
    """gpt-oss: all experts in one tensor `[E, in, out]`; with `partners`, what they hold alternates in the last dim."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        names = [f"{part}.{kind}" for part in partners or (stem,)]
        sources: list[Source] = [_of_experts(block, part, config[count]) for part in names]
        if kind == "weight":
            sources = [Transposed(source) for source in sources]
        joined = Interleaved((sources[0], sources[1])) if len(sources) > 1 else sources[0]
        yield name + ("" if kind == "weight" else f"_{kind}"), joined

    return rule


def keys_and_values(name: str, keys: str, values: str) -> Rule:
    """DeepSeek's two halves of the matrix that gives keys and values."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        pair = [_need(block, f"{part}.{kind}") for part in (keys, values)]
        if any(len(source.shape) != 3 or source.shape[0] != config["num_attention_heads"] for source in pair):
            raise CheckpointError(f"tensors '{keys}' and '{values}' are not of {config['num_attention_heads']} heads")
        if pair[0].shape[1] != pair[1].shape[2]:
            raise CheckpointError(f"tensors '{keys}' and '{values}' are of different ranks")
        yield f"{name}.{kind}", KeysAndValues(*pair)

    return rule


def joined(partner: str) -> Rule:
    """A tensor that the rule of its partner takes along."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        _need(block, f"{partner}.{kind}")
        yield from ()

    return rule


def unused(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
    """A tensor that nothing is computed with."""
    yield from ()


def _need(block: Block, name: str) -> Stored:
    if name not in block:
        raise CheckpointError(f"tensor '{name}' is missing")
    return block[name]


def _of_experts(block: Block, name: str, count: int) -> Stored:
    source = _need(block, name)
    if len(source.shape) < 2 or source.shape[0] != count:
        raise CheckpointError(f"tensor '{name}' has shape {source.shape}; expected {count} experts in its first dim")
    return source
