"""What the compiler made of a sharding: the collectives of one forward pass, counted in the compiled program.

A model configuration, a mesh and rules -> counts and bytes by kind, per block and in total. Compiles the real
ragged step from shapes alone: no weights are read. The truth is the program text, not what the rules intend.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig

if TYPE_CHECKING:
    from jaxllm.weights.loader import AbstractModel

KINDS: tuple[str, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(
    r"= (?P<type>\([^=]*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\((?P<rest>.*)$", re.MULTILINE
)
# Three spellings of who takes part: [groups,size]<=[...], lists of lists, a mesh with some of its axes.
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<iota>\d+)\]|\{\{(?P<first>[\d,]+)\}|mesh\[(?P<mesh>[^\]]*)\] \{(?P<axes>[^}]*)\})"
)
# A TPU program spells a reduce-scatter as a fusion that calls an all-reduce and a slice.
_SCATTER_BODY = re.compile(r"^%all-reduce-scatter\S* \([^\n]*\{\n.*?^\}", re.MULTILINE | re.DOTALL)
_SCATTER_CALL = re.compile(r" fusion(\([^\n]*calls=%all-reduce-scatter)")
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_BLOCK = re.compile(r'op_name="[^"]*?block_(\d+)')
_SOURCE = re.compile(r'op_name="([^"]*)"')
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


@dataclass(frozen=True, slots=True)
class Found:
    """One collective in a compiled program.

    Attributes:
        num_bytes: what each device ends with.
        group_size: devices that take part together; 0 where the text does not say.
        block: of the decoder, or None outside of all.
        source: the operation it was made for, as the compiler knows it.
        position: where in the text; the order within a computation is the order of execution.
    """

    kind: str
    num_bytes: int
    group_size: int
    block: int | None
    source: str
    position: int


def find_collectives(text: str) -> list[Found]:
    """Every collective of a compiled program's text."""
    found = []
    for match in _distinct(text):
        rest = match["rest"]
        block, source = _BLOCK.search(rest), _SOURCE.search(rest)
        found.append(
            Found(
                kind=match["kind"],
                num_bytes=_bytes(match["type"], is_start=match["start"] is not None),
                group_size=_group_size(rest),
                block=int(block[1]) if block else None,
                source=source[1] if source else "",
                position=match.start(),
            )
        )
    return found


def _distinct(text: str) -> Iterator[re.Match[str]]:
    """Each collective once: a TPU program that overlaps one with products repeats it in each link of a chain."""
    text = _SCATTER_CALL.sub(r" reduce-scatter\1", _SCATTER_BODY.sub("", text))
    seen: set[str] = set()
    for match in _INSTRUCTION.finditer(text):
        chain = _CHAIN.search(match["rest"])
        if chain is None or chain[1] not in seen:
            seen.update(chain.groups() if chain else ())
            yield match


def _group_size(attributes: str) -> int:
    if "source_target_pairs={{" in attributes:
        return 2
    if (match := _GROUPS.search(attributes)) is None:
        return 0
    if match["iota"]:
        return int(match["iota"])
    if match["first"]:
        return match["first"].count(",") + 1
    sizes = dict(part.split("=") for part in match["mesh"].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in match["axes"].split(",") if axis.strip())


def count_by_kind(found: list[Found]) -> dict[str, int]:
    """How many there are of each kind."""
    return {kind: sum(f.kind == kind for f in found) for kind in KINDS}


def count_collectives(
    config: EngineConfig, num_tokens: int = 16, devices: list[Any] | None = None, topology: str | None = None
) -> dict[str, Any]:
    """Compile one ragged step of `num_tokens` tokens and count. Keys as in `jaxllm collectives --json`.

    With a `topology` (`v5e:2x4`), or `devices` that are those of one, it is the TPU program of that slice, compiled
    ahead of time on any machine. Where blocks differ (dense and routed layers), `per_block` is that of the block with
    most.
    """
    from jaxllm.deployment.block_layout import block_table
    from jaxllm.families.presets import model_config as read_config

    model_config = read_config(config.model)
    text, model = _compiled_text(config, model_config, num_tokens, devices, topology)
    sizes, found = model.placement.sizes, find_collectives(text)
    per_block = {kind: Counter(f.block for f in found if f.kind == kind and f.block is not None) for kind in KINDS}
    layers = model_config.num_layers
    return {
        "model": config.model,
        "mesh": sizes,
        "sharding_rules": config.sharding_rules,
        "num_layers": layers,
        "num_tokens": num_tokens,
        "per_block": {kind: max(counts.values(), default=0) for kind, counts in per_block.items()},
        "total": count_by_kind(found),
        "bytes": {kind: sum(f.num_bytes for f in found if f.kind == kind) for kind in KINDS},
        "topology": topology,
        "block": block_table(model.cfg, model.placement, model.kv_copies, num_tokens, found),
    }


def _compiled_text(
    config: EngineConfig, cfg: ModelConfig, num_tokens: int, devices: list[Any] | None, topology: str | None
) -> tuple[str, AbstractModel]:
    import jax.numpy as jnp

    from jaxllm.deployment.topology import no_program_cache, open_topology
    from jaxllm.engine.build import make_model
    from jaxllm.runner.programs import lower
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules

    devices = list(open_topology(topology).devices) if topology else devices
    mesh = make_mesh(config.mesh, devices, offset=config.device_offset)
    placement = Placement(mesh, load_rules(config.sharding_rules))
    model = make_model(config, cfg, placement)
    dtype = jnp.dtype(jnp.bfloat16 if topology else jnp.float32)
    shapes = RunnerShapes(
        max_num_seqs=4,
        max_num_batched_tokens=num_tokens,
        token_buckets=(num_tokens,),
        row_buckets=(4,),
        vocab_size=cfg.vocab_size,
        max_model_len=64,
        num_pages=8,
        page_size=config.page_size,
        max_decode_steps=1,
        kv_dtype=dtype,
        residual_dtype=dtype,
        num_replicas=placement.parts("pages"),
    )
    lowered = lower(model, shapes, ("ragged", num_tokens))
    with no_program_cache() if mesh.devices.flat[0].platform == "tpu" else contextlib.nullcontext():
        return lowered.compile().as_text() or "", model


def _bytes(array_type: str, *, is_start: bool) -> int:
    """Bytes of one instruction's result on one device; a tuple is the sum of its parts.

    An asynchronous start gives back its operands beside its results; the results are the larger.
    """
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _ITEM_BYTES.get(name, 4)
        for name, dims in _ARRAY.findall(array_type)
    ]
    return max(sizes, default=0) if is_start else sum(sizes)


def format_counts(counts: dict[str, Any]) -> str:
    """Tables for a person: the counts, and what each device holds."""
    from jaxllm.deployment.block_layout import format_block

    mesh = ",".join(f"{axis}={size}" for axis, size in counts["mesh"].items())
    lines = [
        f"{counts['model']}, mesh {mesh}, rules {counts['sharding_rules']}: one forward pass of "
        f"{counts['num_tokens']} tokens through {counts['num_layers']} blocks",
        f"{'collective':<20}{'per block':>10}{'total':>8}{'bytes':>14}",
    ]
    for kind in KINDS:
        row = f"{counts['per_block'][kind]:>10}{counts['total'][kind]:>8}{counts['bytes'][kind]:>14,}"
        lines.append(f"{kind:<20}{row}")
    return "\n".join([*lines, "", *format_block(counts["block"])])
