"""`jaxllm convert SRC DST --to orbax|safetensors`: one checkpoint into another format, one parameter at a time.

Safetensors come out as a Hugging Face folder (tensors by their Hugging Face names, in files of bounded size with
an index); Orbax as sharded parameters that any mesh can restore. Either is a whole model: tokenizer, templates and
configurations come along (side_files.py). Knows nothing of engines.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.checkpoints.base import Checkpoint
from jaxllm.checkpoints.work_folder import work_folder
from jaxllm.weights.side_files import write_side_files
from jaxllm.weights.tensor_files import taken_apart, write_tensors

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.weights.calibration import Calibration
    from jaxllm.weights.quantize import Plan

FORMATS = ("orbax", "safetensors")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def convert(
    source: str,
    target: Path,
    *,
    to: str,
    dtype: str = "auto",
    mesh: str = "tp=1",
    sharding_rules: str = "megatron",
    quantize: str | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Write the model `source` (anything `--model` names) to the new folder `target`.

    Args:
        to: "orbax" or "safetensors".
        dtype: of the matrices; "auto" keeps bfloat16 and float16, and makes bfloat16 of anything else.
        mesh, sharding_rules: where the parameters lie while they are written (Orbax only).
        quantize: "int8", "int4", "int4:GROUP" or "fp8": round the blocks' linears (safetensors only).
        calibration: a text on which the rounded model should give what it gave before; None: rounded to nearest.

    Raises:
        ValueError: the target exists or cannot be written, or the source cannot be read.
    """
    from jaxllm.checkpoints import open_checkpoint, resolve_model
    from jaxllm.families.tensor_names import named

    if to not in FORMATS:
        raise ValueError(f"cannot convert to {to!r}; use one of {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ValueError(f"cannot convert to dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if calibration is not None and quantize is None:
        raise ValueError("a calibration text is for rounding; say what to round to, with --quantize int4 for instance")
    if quantize is not None and to != "safetensors":
        raise ValueError("quantize writes compressed-tensors, which are safetensors; use --to safetensors")
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; name a new folder")
    checkpoint = named(open_checkpoint(resolve_model(source)))
    plan = tokens = None
    if quantize is not None:
        from jaxllm.weights.quantize import plan_rounding

        plan = plan_rounding(quantize, checkpoint)
    if calibration is not None:
        tokens = _calibration_tokens(checkpoint, calibration)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(target.parent, f".{target.name}.convert-") as parent:
            partial = parent / target.name
            partial.mkdir()
            write_side_files(checkpoint, partial, None if to == "orbax" else dtype)  # first: what fails fails soon
            if to == "orbax":
                _to_orbax(checkpoint, partial, dtype, mesh, sharding_rules)
            else:
                _to_safetensors(checkpoint, partial, dtype, plan, tokens)
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write {target}: {reason}; name a place with room that may be written to") from error
    return target


def _to_orbax(checkpoint: Checkpoint, folder: Path, dtype: str, mesh: str, sharding_rules: str) -> None:
    import jax.numpy as jnp

    from jaxllm.families import read_config
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules
    from jaxllm.weights.abstract import abstract_model
    from jaxllm.weights.loader import load_parameters
    from jaxllm.weights.orbax import is_orbax, restore_parameters, save_parameters

    placement = Placement(make_mesh(mesh), load_rules(sharding_rules))
    name = "bfloat16" if dtype == "auto" else dtype
    model = abstract_model(read_config(checkpoint.config), placement, jnp.dtype(name))
    if is_orbax(checkpoint.path):
        params = restore_parameters(model, checkpoint.path)
    else:
        params = load_parameters(model, checkpoint)
    save_parameters(model, params, folder)


def _calibration_tokens(checkpoint: Checkpoint, calibration: Calibration) -> np.ndarray:
    from jaxllm.weights.calibration import calibration_tokens
    from jaxllm.weights.orbax import is_orbax

    if is_orbax(checkpoint.path):
        raise ValueError("calibration reads a checkpoint of tensors, and this is an Orbax one; convert it first")
    return calibration_tokens(checkpoint, calibration)


def _to_safetensors(
    checkpoint: Checkpoint, folder: Path, dtype: str, plan: Plan | None, tokens: np.ndarray | None
) -> None:
    from jaxllm.weights.orbax import is_orbax

    tensors = _from_orbax(checkpoint, dtype) if is_orbax(checkpoint.path) else _from_tensors(checkpoint, dtype)
    if plan is not None:
        from jaxllm.weights.quantize import rounded, write_config

        write_config(plan, folder)
        tensors = rounded(tensors, plan) if tokens is None else _calibrated(checkpoint, dtype, plan, tokens)
    write_tensors(tensors, folder)


def _calibrated(checkpoint: Checkpoint, dtype: str, plan: Plan, tokens: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    from jaxllm.weights.calibration import calibrated

    yield from _from_tensors(checkpoint, dtype, plan.linears)
    yield from calibrated(checkpoint, plan, tokens)


def _from_tensors(checkpoint: Checkpoint, dtype: str, but: Collection[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    import ml_dtypes
    import numpy as np

    for name, info in checkpoint.tensors.items():
        if name in but:
            continue
        keep = info.dtype if info.dtype in ("bfloat16", "float16") or len(info.shape) == 1 else ml_dtypes.bfloat16
        yield name, checkpoint.read(name).astype(np.dtype(keep if dtype == "auto" else dtype), copy=False)
        checkpoint.release(name)


def _from_orbax(checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Restore the parameters and take each apart into the tensors it was made of."""
    import jax.numpy as jnp
    from flax import nnx

    from jaxllm.families import family_of, read_config
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules
    from jaxllm.weights.abstract import abstract_model
    from jaxllm.weights.orbax import restore_parameters

    placement = Placement(make_mesh("tp=1"), load_rules("replicated"))
    cfg = read_config(checkpoint.config)
    model = abstract_model(cfg, placement, jnp.dtype("bfloat16" if dtype == "auto" else dtype))
    values = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(restore_parameters(model, checkpoint.path))}
    yield from taken_apart(values, family_of(checkpoint.config).weight_map(cfg, 1))
