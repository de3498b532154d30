"""A deployment on paper: a model on the mesh of a TPU slice, with its static sizes and its lower bounds of time.

An `EngineConfig` and a topology -> a `Deployment`, without compiling, weights or devices.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.deployment.program_text import CompiledProgram
from jaxllm.deployment.topology import Topology, memory_limit, open_topology
from jaxllm.roofline.bounds import Collective, DeviceWork, lower_bound
from jaxllm.sharding.rules import as_tuple

if TYPE_CHECKING:
    from jaxllm.checkpoints import Checkpoint
    from jaxllm.runner.programs import DeviceState
    from jaxllm.runner.shapes import RunnerShapes
    from jaxllm.weights.abstract import AbstractModel


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on the mesh of one slice, and its static sizes with the fewest pages that make sense."""

    config: EngineConfig
    topology: Topology
    model: AbstractModel
    shapes: RunnerShapes
    limit: int
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None

    @property
    def budget(self) -> float:
        """Bytes of one device that the engine may use."""
        return self.limit * self.config.gpu_memory_utilization

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of every layer on one device."""
        return _local_bytes(self._state().pages) // self.shapes.num_pages

    @property
    def state_bytes(self) -> int:
        """Bytes of the per-slot state on one device."""
        return _local_bytes(self._state().slots)

    def _state(self) -> DeviceState:
        from jaxllm.runner.programs import abstract_state

        return abstract_state(self.model, self.shapes)


@dataclass(slots=True)
class Memory:
    """How the memory of one device is spent: `temporaries` and `pages` grow with the number of pages, linearly."""

    fixed: float = 0.0
    per_page: float = 0.0
    problem: str | None = None
    programs: dict[str, CompiledProgram] = field(default_factory=dict)


def open_deployment(config: EngineConfig, topology_name: str) -> Deployment:
    """Everything that is known without compiling. Raises ValueError as `make_plan`."""
    from jaxllm.families import read_config
    from jaxllm.families.presets import hf_config
    from jaxllm.sharding.rules import load_rules, parse_mesh
    from jaxllm.weights.source import files_of

    parse_mesh(config.mesh)
    load_rules(config.sharding_rules)
    topology = open_topology(topology_name)
    checkpoint = files_of(config)
    hf = hf_config(config.model) if checkpoint is None else checkpoint.config
    cfg, notes = _stretch(read_config(hf), config.max_model_len)
    return deploy(config, cfg, topology, memory_limit(topology), notes, checkpoint)


def deploy(
    config: EngineConfig,
    cfg: ModelConfig,
    topology: Topology,
    limit: int,
    notes: tuple[str, ...] = (),
    checkpoint: Checkpoint | None = None,
) -> Deployment:
    """A configuration on the mesh of a slice that is open already. Raises ValueError where it is not legal.

    `checkpoint` says which of its matrices a model's files keep quantised; None: it has no files.
    """
    from jaxllm.families.presets import model_config
    from jaxllm.runner.shapes import runner_shapes
    from jaxllm.sharding.mesh import Placement, make_mesh
    from jaxllm.sharding.rules import load_rules
    from jaxllm.weights.abstract import make_model
    from jaxllm.weights.source import files_of

    if config.enable_lora:
        raise ValueError("adapters are no part of a deployment on paper; leave enable_lora (--enable-lora) out")
    placement = Placement(make_mesh(config.mesh, list(topology.devices)), load_rules(config.sharding_rules))
    model = make_model(config, cfg, placement, checkpoint)
    if config.speculative is not None and config.speculative.model is not None:
        own = dataclasses.replace(config, model=config.speculative.model, speculative_config=None)
        model = dataclasses.replace(model, draft=make_model(own, model_config(own.model), placement, files_of(own)))
    model.shardings()  # refuses what does not divide
    max_len = config.max_model_len or cfg.max_position_embeddings
    enough = dataclasses.replace(config, max_model_len=max_len, kv_cache_memory_bytes=1 << 60)
    shapes = runner_shapes(enough, model)
    pages = shapes.pages_per_row + 1 if config.max_model_len else 2
    return Deployment(config, topology, model, dataclasses.replace(shapes, num_pages=pages), limit, notes, checkpoint)


def _stretch(cfg: ModelConfig, max_model_len: int | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """A plan may look beyond the positions a model was trained for, as long as they are not a table of weights."""
    if max_model_len is None or max_model_len <= cfg.position_limit or cfg.learned_positions:
        return cfg, ()
    note = f"max_model_len={max_model_len} is beyond the model's {cfg.position_limit} positions"
    note += "; an engine refuses it"
    return dataclasses.replace(cfg, max_position_embeddings=max_model_len), (note,)


def _local_bytes(arrays: Any) -> int:
    import jax

    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def device_work(deployment: Deployment, *, tokens: int, rows: int, context: int) -> DeviceWork:
    """What one device reads and multiplies for `tokens` tokens of `rows` rows with `context` tokens in the cache.

    Every parameter once (of routed experts those that are hit), two FLOPs per parameter and token. The devices of
    an axis that the rules use share the work; those of another repeat it.
    """
    from jaxllm.roofline.cost_model import active_parameters, attention_windows, model_cost

    model, sizes = deployment.model, deployment.model.placement.sizes
    rules = model.placement.rules
    used = {a for axes in (*rules.parameters.values(), *rules.activations.values()) for a in as_tuple(axes)}
    sharers = math.prod(size for axis, size in sizes.items() if axis in used)
    cost = model_cost(model.cfg)
    idle = (1 - cost.experts_touched) ** tokens * cost.expert_bytes / (2 * model.cfg.num_parameters)
    windows = attention_windows(model.cfg)
    seen = sum(n * min(context, window or context) for window, n in windows) / sum(n for _, n in windows)
    token_bytes = deployment.page_bytes / deployment.shapes.page_size
    return DeviceWork(
        weight_bytes=model.parameter_bytes_per_device() * (1 - idle),
        kv_bytes=rows * seen * token_bytes,
        flops=2 * tokens * deployment.shapes.num_replicas * active_parameters(model.cfg) / sharers,
    )


def bounds(deployment: Deployment, context: int, programs: dict[str, CompiledProgram] | None = None) -> dict[str, Any]:
    """Lower bounds of one decode iteration of all rows and of one prefill chunk without a prefix."""
    shapes, chip, size = deployment.shapes, deployment.topology.chip, deployment.model.placement.mesh.size
    rows, chunk = shapes.max_num_seqs, shapes.max_num_batched_tokens
    work = {
        "decode": device_work(deployment, tokens=rows, rows=rows, context=context),
        "prefill": device_work(deployment, tokens=chunk, rows=0, context=0),
    }
    result = {}
    for phase, one in work.items():
        found = programs[phase].collectives if programs else []
        sent = tuple(Collective(f.kind, f.num_bytes, f.group_size or size) for f in found)
        result[phase] = lower_bound(dataclasses.replace(one, collectives=sent), chip)
    return result
