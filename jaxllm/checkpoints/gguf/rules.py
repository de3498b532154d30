"""What becomes of a tensor of a GGUF block: the Hugging Face tensors that are made of it.

A rule is called for the file's tensor `stem.kind` ("attn_q", "weight") of one layer, sees all tensors of the layer
and yields Hugging Face names (below the layer's prefix) with their sources. Knows nothing of architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.checkpoints.base import CheckpointError
from jaxllm.checkpoints.gguf.sources import (
    Expert,
    Interleaved,
    KeysAndValues,
    OneRow,
    Rows,
    Source,
    Stacked,
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


def queries_keys_values(prefix: str, *, are_rotated: bool = True) -> Rule:
    """One tensor for all three, taken apart; `prefix` is followed by `q_proj` and so on."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source, width = block[f"{stem}.{kind}"], config["head_dim"]
        heads = [config["num_attention_heads"], config["num_key_value_heads"], config["num_key_value_heads"]]
        if source.shape[0] != sum(heads) * width:
            raise CheckpointError(f"tensor '{stem}.{kind}' has {source.shape[0]} rows; expected {sum(heads) * width}")
        start = 0
        for letter, count in zip("qkv", heads, strict=True):
            rows = Rows(source, start, start + count * width)
            start += count * width
            yield f"{prefix}.{letter}_proj.{kind}", rows if are_rotated or letter == "v" else Unrotated(rows, count)

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


def experts_interleaved(name: str, count: str, gate: str, up: str) -> Rule:
    """gpt-oss: all experts in one tensor `[E, in, out]`, gate and up alternating in its last dim."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        first, second = _pair(block, gate, up, kind, config[count])
        is_matrix = kind == "weight"
        pair = (Transposed(first), Transposed(second)) if is_matrix else (first, second)
        yield name + _suffix(kind), Interleaved(pair)

    return rule


def experts_transposed(name: str, count: str) -> Rule:
    """gpt-oss: all experts in one tensor `[E, in, out]`."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source = _of_experts(block, f"{stem}.{kind}", config[count])
        yield name + _suffix(kind), Transposed(source) if kind == "weight" else source

    return rule


def experts_stacked(name: str, count: str, gate: str, up: str) -> Rule:
    """Granite: all experts in one tensor `[E, 2 * out, in]`, gate above up."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        yield f"{name}.{kind}", Stacked(_pair(block, gate, up, kind, config[count]))

    return rule


def experts_with_gate_above(gate: str, up: str, count: str) -> Rule:
    """All experts' gates and ups in one tensor `[E, 2 * out, in]`, as some converters write them."""

    def rule(block: Block, stem: str, kind: str, config: Mapping[str, Any]) -> Made:
        source = _of_experts(block, f"{stem}.{kind}", config[count])
        half, odd = divmod(source.shape[1], 2)
        if odd:
            raise CheckpointError(
                f"tensor '{stem}.{kind}' has {source.shape[1]} rows per expert; expected an even number"
            )
        for number in range(config[count]):
            expert = Expert(source, number)
            yield f"{gate.format(number)}.{kind}", Rows(expert, 0, half)
            yield f"{up.format(number)}.{kind}", Rows(expert, half, 2 * half)

    return rule


def _pair(block: Block, gate: str, up: str, kind: str, count: int) -> tuple[Stored, Stored]:
    first, second = (_of_experts(block, f"{part}.{kind}", count) for part in (gate, up))
    if first.shape != second.shape:
        raise CheckpointError(f"tensors '{gate}.{kind}' {first.shape} and '{up}.{kind}' {second.shape} differ in shape")
    return first, second


def _suffix(kind: str) -> str:
    return "" if kind == "weight" else f"_{kind}"


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
