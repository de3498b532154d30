"""What the engine's own devices could do, and what its own arrays weigh: mesh and model -> numbers for the books.

The one place of the accounting that knows devices. Data sheets come from `jaxllm.roofline.chips`; what is not in
them is measured, on demand only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from jaxllm.kv.layout import token_bytes
from jaxllm.kv.page_programs import device_bytes
from jaxllm.roofline.chips import Chip, chip_of_device, measure_device
from jaxllm.roofline.cost_model import ModelCost, model_cost
from jaxllm.telemetry.accounting import Ceilings
from jaxllm.weights.abstract import AbstractModel


def engine_cost(model: AbstractModel, kv_dtype: jnp.dtype) -> ModelCost:
    """The model's cost with the bytes that its shards really have: copies, padding and dtypes as they lie."""
    mesh, placement = model.placement.mesh, model.placement
    cuts = placement.parts("pages") * (placement.parts("heads") if model.cfg.cache_row.is_cut else 1)
    cost = model_cost(model.cfg, kv_copies=model.kv_copies)
    kv_bytes = token_bytes(model.cfg, kv_dtype, model.kv_copies) / model.cfg.num_layers
    blocks, tables = _weight_bytes(model)
    share = cost.expert_bytes / (cost.block_bytes + cost.expert_bytes)
    return dataclasses.replace(
        cost,
        block_bytes=blocks * (1 - share),
        expert_bytes=blocks * share,
        head_bytes=tables.get("lm_head", tables["embedding"]),
        embedding_row_bytes=tables["embedding"] / (model.cfg.vocab_size + model.vocab_padding),
        kv_bytes=kv_bytes * mesh.size / cuts,
    )


def _weight_bytes(model: AbstractModel) -> tuple[float, dict[str, float]]:
    """Bytes over all devices of the blocks (and what else is read whole), and of each table."""
    blocks, tables = 0.0, {}
    for path, variable in nnx.to_flat_state(model.parameters):
        size = device_bytes(variable.get_value())
        if path[0] in ("embedding", "lm_head", "positions"):
            tables[str(path[0])] = float(size)
        else:
            blocks += size
    return blocks, tables


def known_ceilings(model: AbstractModel) -> Ceilings | None:
    """From the data sheet of the mesh's devices, or None where they must be measured."""
    chip = chip_of_device(model.placement.mesh.devices.flat[0].device_kind)
    return _ceilings(chip, model, "data sheet") if chip else None


def measured_ceilings(model: AbstractModel, between: Callable[[], None] = lambda: None) -> Ceilings:
    """Measure a device of the mesh: takes under a second on a CPU, and the device for itself; see `measure_device`."""
    matrices = max(nnx.to_flat_state(model.state), key=lambda item: item[1].get_value().size)[1].get_value()
    device = model.placement.mesh.devices.flat[0]
    return _ceilings(measure_device(matrices.dtype.name, device=device, between=between), model, "measured")


def _ceilings(chip: Chip, model: AbstractModel, how: str) -> Ceilings:
    """Of the whole mesh; emulated CPU devices share one machine."""
    mesh = model.placement.mesh
    count = 1 if mesh.devices.flat[0].platform == "cpu" else mesh.size
    source = chip.title if how in chip.title else f"{chip.title} ({how})"
    return Ceilings(count * chip.flops, count * chip.bandwidth, f"{count} x {source}" if count > 1 else source)
