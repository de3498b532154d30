"""What the compiler made of a sharding: the collectives of one forward pass, counted in the compiled program.

A model configuration, a mesh and rules -> counts and bytes by kind, per block and in total. Compiles the real
ragged step from shapes alone: no weights are read. The truth is the program text, not what the rules intend.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jaxllm.config import EngineConfig, ModelConfig

KINDS: tuple[str, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    r"= (?P<type>\([^=]*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r")(?:-start)?\((?P<rest>.*)$", re.MULTILINE
)
# A TPU program spells a reduce-scatter as a fusion that calls an all-reduce and a slice.
_SCATTER_BODY = re.compile(r"^%all-reduce-scatter\S* \([^\n]*\{\n.*?^\}", re.MULTILINE | re.DOTALL)
_SCATTER_CALL = re.compile(r" fusion(\([^\n]*calls=%all-reduce-scatter)")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_BLOCK = re.compile(r'op_name="[^"]*?block_(\d+)')
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}


def count_collectives(config: EngineConfig, num_tokens: int = 16, devices: list[Any] | None = None) -> dict[str, Any]:
    """Compile one ragged step of `num_tokens` tokens and count. Keys as in `jaxllm collectives --json`.

    `devices` may be those of a topology description: its program is compiled ahead of time, on any machine.
    Where blocks differ (dense and routed layers), `per_block` is that of the block with most.
    """
    from jaxllm.models.presets import model_config as read_config

    model_config = read_config(config.model)
    text, sizes = _compiled_text(config, model_config, num_tokens, devices)
    per_block: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
    total, num_bytes = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for match in _distinct(text):
        kind = match["kind"]
        total[kind] += 1
        num_bytes[kind] += _bytes(match["type"])
        if block := _BLOCK.search(match["rest"]):
            per_block[kind][int(block[1])] += 1
    layers = model_config.num_layers
    return {
        "model": config.model,
        "mesh": sizes,
        "sharding_rules": config.sharding_rules,
        "num_layers": layers,
        "num_tokens": num_tokens,
        "per_block": {kind: max(counts.values(), default=0) for kind, counts in per_block.items()},
        "total": total,
        "bytes": num_bytes,
    }


def _distinct(text: str) -> Iterator[re.Match[str]]:
    """Each collective once: a TPU program that overlaps one with products repeats it in each link of a chain."""
    text = _SCATTER_CALL.sub(r" reduce-scatter\1", _SCATTER_BODY.sub("", text))
    seen: set[str] = set()
    for match in _INSTRUCTION.finditer(text):
        chain = _CHAIN.search(match["rest"])
        if chain is None or chain[1] not in seen:
            seen.update(chain.groups() if chain else ())
            yield match


def _compiled_text(
    config: EngineConfig, cfg: ModelConfig, num_tokens: int, devices: list[Any] | None
) -> tuple[str, dict[str, int]]:
    import jax.numpy as jnp

    from jaxllm.engine.build import make_model
    from jaxllm.engine.runner import RunnerShapes, abstract_arrays, lower, make_programs
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules

    placement = Placement(make_mesh(config.mesh, devices), load_rules(config.sharding_rules))
    model = make_model(config, cfg, placement)
    dtype = jnp.dtype(jnp.float32)
    shapes = RunnerShapes(
        max_num_seqs=4,
        max_num_batched_tokens=num_tokens,
        max_model_len=64,
        num_pages=8,
        page_size=config.page_size,
        max_decode_steps=1,
        kv_dtype=dtype,
        residual_dtype=dtype,
        num_replicas=placement.parts("pages"),
        token_multiple=placement.token_multiple(),
    )
    arrays = abstract_arrays(model, shapes)
    program = lower(make_programs(model, shapes), shapes, model, ("ragged", num_tokens, True), *arrays).compile()
    return program.as_text(), placement.sizes


def _bytes(array_type: str) -> int:
    """Bytes of one instruction's result on one device; a tuple is the sum of its parts."""
    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * _ITEM_BYTES.get(name, 4)
        for name, dims in _ARRAY.findall(array_type)
    )


def format_counts(counts: dict[str, Any]) -> str:
    """A table for a person."""
    mesh = ",".join(f"{axis}={size}" for axis, size in counts["mesh"].items())
    lines = [
        f"{counts['model']}, mesh {mesh}, rules {counts['sharding_rules']}: one forward pass of "
        f"{counts['num_tokens']} tokens through {counts['num_layers']} blocks",
        f"{'collective':<20}{'per block':>10}{'total':>8}{'bytes':>14}",
    ]
    for kind in KINDS:
        row = f"{counts['per_block'][kind]:>10}{counts['total'][kind]:>8}{counts['bytes'][kind]:>14,}"
        lines.append(f"{kind:<20}{row}")
    return "\n".join(lines)
