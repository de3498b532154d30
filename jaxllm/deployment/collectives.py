"""What the compiler made of a sharding: the collectives of one forward pass, counted in the compiled program.

A model configuration, a mesh and rules -> counts and bytes by kind, per block and in total. Compiles the real
ragged step from shapes alone: no weights are read. The truth is the program text, not what the rules intend.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.deployment.block_layout import block_table, format_block
from jaxllm.deployment.program_text import KINDS, count_by_kind, find_collectives

if TYPE_CHECKING:
    from jaxllm.weights.abstract import AbstractModel


def count_collectives(
    config: EngineConfig, num_tokens: int = 16, devices: list[Any] | None = None, topology: str | None = None
) -> dict[str, Any]:
    """Compile one ragged step of `num_tokens` tokens and count. Keys as in `jaxllm collectives --json`.

    With a `topology` (`v5e:2x4`), or `devices` that are those of one, it is the TPU program of that slice, compiled
    ahead of time on any machine. Where blocks differ (dense and routed layers), `per_block` is that of the block with
    most.
    """
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
    from jaxllm.runner.programs import lower
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules
    from jaxllm.weights.abstract import make_model
    from jaxllm.weights.source import files_of

    devices = list(open_topology(topology).devices) if topology else devices
    mesh = make_mesh(config.mesh, devices, offset=config.device_offset)
    placement = Placement(mesh, load_rules(config.sharding_rules))
    model = make_model(config, cfg, placement, files_of(config))
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
    with no_program_cache():  # its key leaves names out: a program of an older version would come with that one's
        return lowered.compile().as_text() or "", model


def format_counts(counts: dict[str, Any]) -> str:
    """Tables for a person: the counts, and what each device holds."""
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
