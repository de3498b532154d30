"""`jaxllm train`: one run from a configuration to a folder that the next command serves.

`TrainConfig` -> the report that `--json` prints. The one place where files, models, steps and checkpoints meet.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.checkpoints.work_folder import work_folder
from jaxllm.config import EngineConfig
from jaxllm.families import read_config
from jaxllm.ops.cpu import ffi
from jaxllm.runner.members import member_of
from jaxllm.runner.processes import start_runtime
from jaxllm.sharding.mesh import Placement, make_mesh
from jaxllm.sharding.rules import load_rules
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.config import TrainConfig, given
from jaxllm.training.data.files import find_files
from jaxllm.training.journal import Journal
from jaxllm.training.loss import LossModel, Objective
from jaxllm.training.material import Material, load_material
from jaxllm.training.optimizer import learning_rate, make_optimizer
from jaxllm.training.origin import Origin, find_origin
from jaxllm.training.output import on_host, write_model
from jaxllm.training.step import TrainState, TrainStep
from jaxllm.training.trained import HEAD, Adapter, choose_trained
from jaxllm.training.trainer import Trainer
from jaxllm.weights.abstract import abstract_model

# What may differ between a run and its continuation.
_FREE = (
    "resume output data eval_data eval_every eval_batches save_every keep_checkpoints sample_every sample_prompt "
    "sample_tokens tensorboard plot dtype coordinator_address num_processes process_id mesh sharding_rules remat"
).split()


Write = Callable[[Path], None]  # what is trained, as it is now, into a folder


def train(config: TrainConfig, on_step: Callable[[int, Write], None] | None = None) -> dict[str, Any]:
    """Train, and write what came out. Raises ValueError with one line that says what to do.

    `on_step(step, write)` is called after every step; `write(folder)` writes the model or adapter of that step.
    """
    _join(config)
    output = Path(config.output)
    files = find_files(config.data, config.eval_data)
    _check_output(config, output)
    placement = Placement(make_mesh(config.mesh), load_rules(config.rules))
    origin = find_origin(config, files.train)
    limit = read_config(origin.hf).max_position_embeddings
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with work_folder(output.absolute().parent, f".{output.name}.tokens-") as work:
        material = load_material(config, files, origin.tokenizer, limit, work)
        return _train(config, output, placement, origin, material, on_step)


def _join(config: TrainConfig) -> None:
    """Several processes each run the whole program, on their own part of the mesh."""
    engine = EngineConfig(
        mesh=config.mesh,
        coordinator_address=config.coordinator_address,
        num_processes=config.num_processes,
        process_id=config.process_id,
    )
    if (member := member_of(engine)) is not None and not jax.distributed.is_initialized():
        start_runtime(member, engine)


def _check_output(config: TrainConfig, output: Path) -> None:
    there = output.is_dir() and any(output.iterdir())
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    if there and not config.resume and jax.process_index() == 0:
        raise ValueError(f"output {output} exists and is not empty; say --resume to go on, or name a new folder")


def _train(
    config: TrainConfig,
    output: Path,
    placement: Placement,
    origin: Origin,
    material: Material,
    on_step: Callable[[int, Write], None] | None,
) -> dict[str, Any]:
    parts = placement.parts("tokens")
    if config.spans % parts:
        raise ValueError(
            f"batch_size={config.spans} does not divide by the {parts} devices that share tokens; use a "
            f"multiple of {parts}"
        )
    cfg = read_config(origin.hf)
    model = abstract_model(cfg, placement, _compute_dtype(config, placement))
    if model.kv_copies > 1:
        raise ValueError(f"mesh {config.mesh!r} repeats key/value heads, which training does not; use a smaller tp")
    whole = abstract_model(cfg, placement, jnp.dtype(jnp.float32))
    adapter = Adapter.of(config, model, origin.hf) if config.lora_rank else None
    trained = choose_trained(config, model, origin.parameters(whole, config.seed), adapter, len(material.labels or ()))
    loss = LossModel(
        model,
        material.span,
        Objective(config.z_loss, config.router_balance if cfg.experts else 0.0),
        config.remat,
        trained.product,
        HEAD if material.labels else None,
    )
    steps = config.steps or _steps(config, material)
    schedule = learning_rate(config, steps)
    optimizer = make_optimizer(config, schedule, trained.matrices)
    step = TrainStep(loss, optimizer, trained.shardings, config.max_grad_norm)
    output.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(output, config.keep_checkpoints)
    facts = {**_facts(config), "steps": steps, "span": material.span}
    state = step.initial(trained.parameters)
    if config.resume and checkpoints.newest is not None:
        state = checkpoints.restore(state, facts)
    journal = Journal(output, int(state.step), steps, tensorboard=config.tensorboard, quiet=jax.process_index() > 0)
    for note in material.notes:
        journal.say(note)
    trainer = Trainer(config, step, trained.frozen, material, origin.tokenizer, checkpoints, journal, schedule, steps)

    def write(folder: Path, state: TrainState) -> None:
        _write(config, folder, origin, material, adapter, {**trained.frozen, **state.parameters})

    if on_step:
        trainer.on_step = lambda step, state: on_step(step, lambda folder: write(folder, state))
    try:
        state, report = trainer.run(state, lambda step: checkpoints.save(step.step, step.state, facts))
    finally:
        checkpoints.close()
        journal.close(plot=config.plot)
    if report.pop("ended"):
        write(output, state)
    return {"task": config.task, **report, "output": str(output)}


def _facts(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must have in common with the one it goes on from."""
    return {name: value for name, value in given(config).items() if name not in _FREE}


def _steps(config: TrainConfig, material: Material) -> int:
    """From epochs; pretraining without either goes over the data once, at least 100 and at most 2000 steps."""
    passes = config.passes
    batches = sum(material.train.num_batches(epoch) for epoch in range(passes or 1))
    steps = -(-batches // config.grad_accumulation)
    return steps if passes else min(2000, max(100, steps))


def _compute_dtype(config: TrainConfig, placement: Placement) -> jnp.dtype:
    """Of products: bfloat16 where the devices have products of it."""
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    is_cpu = placement.mesh.devices.flat[0].platform == "cpu"
    return jnp.dtype(jnp.float32 if is_cpu and ffi.unavailable() else jnp.bfloat16)


def _write(
    config: TrainConfig,
    output: Path,
    origin: Origin,
    material: Material,
    adapter: Adapter | None,
    parameters: dict[str, jax.Array],
) -> None:
    if adapter and material.labels is None:
        values = on_host({name: value for name, value in parameters.items() if name.startswith("lora.")})
        if jax.process_index() == 0:
            adapter.write(output, values)
        return
    values = on_host(parameters)
    if adapter:  # a classifier's head is no part of PEFT's files here, so its adapter goes into the weights
        values |= adapter.merged(values)
    if jax.process_index() == 0:
        write_model(output, origin, values, config.dtype, material.labels)
