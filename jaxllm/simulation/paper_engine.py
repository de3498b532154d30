"""An engine on paper: a model, a chip and a mesh -> the engine's own loop over a modelled runner.

Checks what a deployment would: whether the cut is legal, and whether weights and one request fit beside each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.engine.engine import Engine
from jaxllm.engine.schedulers import schedulers_for
from jaxllm.roofline.chips import PCIE_GEN5, Chip
from jaxllm.roofline.cost_model import ITEM_BYTES, QUANTIZED, ModelCost, model_cost
from jaxllm.roofline.iteration_time import DATA_SHEET, Efficiency, IterationTime, RooflineTime
from jaxllm.roofline.profile import Profile
from jaxllm.runner.shapes import RunnerShapes, token_buckets
from jaxllm.scheduling.host_pool import HostPool
from jaxllm.scheduling.pace import Pace
from jaxllm.scheduling.page_pool import PagePool
from jaxllm.scheduling.plan import IterationPlan
from jaxllm.scheduling.replicas import Scheduling, side_by_side
from jaxllm.scheduling.tiers import Tiers
from jaxllm.sharding.rules import kv_copies, load_rules, parse_mesh
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.modelled_runner import ModelledRunner, PaperModel
from jaxllm.simulation.paper_drafts import PaperDrafts
from jaxllm.simulation.paper_memory import PaperDisk, PaperMemory, PaperMover
from jaxllm.simulation.steering import Gate, Steered
from jaxllm.telemetry.accounting import Accounting, Ceilings

_TEMPORARY_BYTES = 1 << 30  # of each device, for activations and logits: as the engine leaves free


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the engine runs on.

    Attributes:
        chip: data sheet of one device; with a profile, what was measured of it.
        efficiency: what is reached of the data sheet.
        profile: measured iterations, which then stand in for data sheet and efficiency.
        host_link: bytes per second between a device and host memory, each way.
        disk_rate: bytes per second of the disk.
        acceptance: the chance of a draft to be right, where there are drafts.
    """

    chip: Chip
    efficiency: Efficiency = DATA_SHEET
    profile: Profile | None = None
    host_link: float = PCIE_GEN5
    disk_rate: float = 3e9
    acceptance: float | None = None


@dataclass(slots=True)
class PaperEngine:
    """One engine, its devices and its clock."""

    engine: Engine
    runner: ModelledRunner
    scheduling: Steered
    clock: VirtualClock
    num_devices: int

    @property
    def load(self) -> int:
        """Requests queued or running."""
        return len(self.scheduling.running) + self.scheduling.num_waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How requests are admitted and iterations planned, where that is not the engine's own way.

    Attributes:
        gate: made for each engine, from its sizes and its page pool.
        plan_with: see `Steered`.
        chunked_prefill: whether prompts are cut to the token budget.
    """

    gate: Callable[[RunnerShapes, PagePool], Gate] | None = None
    plan_with: Callable[[Scheduling], IterationPlan | None] | None = None
    chunked_prefill: bool = True


def paper_engine(
    config: EngineConfig,
    cfg: ModelConfig,
    hardware: Hardware,
    *,
    policy: Policy | None = None,
    clock: VirtualClock | None = None,
) -> PaperEngine:
    """Build one, by the `clock` of a host that it shares with others, if given.

    Raises ValueError in one line where it could not run.
    """
    policy, clock = policy or Policy(), clock or VirtualClock()
    sizes = _mesh(config.mesh)
    tp, dp = sizes.get("tp", 1), sizes.get("dp", 1)
    cost = _cost(config, cfg, sizes)
    shapes = _shapes(config, cfg, hardware, cost, tp=tp, dp=dp)
    pools = [
        PagePool(
            shapes.num_pages,
            shapes.page_size,
            enable_prefix_caching=config.enable_prefix_caching,
            window=cfg.cache_window,
        )
        for _ in range(dp)
    ]
    memory = _memory(config, hardware, pools, int(cost.kv_bytes * cfg.num_layers * shapes.page_size), tp, clock)
    profile, efficiency = hardware.profile, hardware.efficiency
    time: IterationTime = profile or RooflineTime(
        cost=cost,
        chip=hardware.chip,
        num_layers=cfg.num_layers,
        hidden_size=cfg.hidden_size,
        tp=tp,
        eight_bit=config.activation_dtype == "int8",
        efficiency=efficiency,
    )
    host_s = 0.0 if profile else efficiency.host_s  # what was measured has the host's time in it
    runner = ModelledRunner(
        PaperModel(cfg),
        shapes,
        memory,
        cost=cost,
        time=time,
        clock=clock,
        host_s=host_s,
        drafts=_drafts(config, hardware) if shapes.num_drafts else None,
    )
    pace = Pace(token_buckets(config))
    schedulers = schedulers_for(memory, shapes, chunked_prefill=policy.chunked_prefill, pace=pace)
    gate = policy.gate(shapes, pools[0]) if policy.gate else None
    plan_with = {"plan_with": policy.plan_with} if policy.plan_with else {}
    scheduling = Steered(side_by_side(schedulers), runner, gate, **plan_with)
    if memory.mover is not None:
        memory.mover.horizon = lambda: scheduling.horizon
    chip = hardware.chip
    ceilings = Ceilings(tp * dp * chip.flops, tp * dp * chip.bandwidth, chip.title)
    whole = dataclasses.replace(cost, **{name: dp * getattr(cost, name) for name in _BYTES})
    accounting = Accounting(whole, ceilings)
    engine = Engine(runner, scheduling=scheduling, accounting=accounting, pace=pace, seed=config.seed)
    return PaperEngine(engine, runner, scheduling, clock, tp * dp)


def _memory(
    config: EngineConfig, hardware: Hardware, pools: list[PagePool], page_bytes: int, tp: int, clock: VirtualClock
) -> PaperMemory:
    """Page pools, and host memory and a disk below them where the configuration asks for these."""
    if not config.host_kv_bytes:
        if config.preemption_mode == "swap":
            raise ValueError("preemption_mode='swap' needs room in host memory; set host_kv_bytes")
        return PaperMemory(pools, page_bytes)
    if config.host_kv_bytes < page_bytes:
        raise ValueError(f"host_kv_bytes={config.host_kv_bytes} is less than one page; use at least {page_bytes}")
    disk = PaperDisk(config.disk_kv_bytes // page_bytes) if config.disk_kv_bytes else None
    host = HostPool(config.host_kv_bytes // page_bytes, on_evict=disk.write if disk else None)
    tiers = Tiers(host, disk, page_bytes=page_bytes, preemption=config.preemption_mode)
    link = tp * hardware.host_link
    return PaperMemory(pools, page_bytes, tiers, PaperMover(tiers, clock, link, hardware.disk_rate, disk))


def _drafts(config: EngineConfig, hardware: Hardware) -> PaperDrafts:
    """Raises ValueError for what is not modelled."""
    assert config.speculative is not None
    if hardware.acceptance is None:
        raise ValueError("a simulation does not know which drafts are right; set acceptance_rate")
    if hardware.profile is not None:
        raise ValueError("a profile has no iterations that verify drafts; leave speculative_config out")
    if config.speculative.method != "ngram":
        raise ValueError("speculative_config: a draft model is not simulated; use method 'ngram' with acceptance_rate")
    return PaperDrafts(hardware.acceptance, seed=config.seed)


_BYTES = ("block_bytes", "head_bytes", "embedding_row_bytes", "kv_bytes", "expert_bytes")


def _mesh(text: str) -> dict[str, int]:
    sizes = parse_mesh(text)
    if other := [axis for axis, size in sizes.items() if axis not in ("tp", "dp") and size > 1]:
        raise ValueError(f"mesh {text!r}: axis {other[0]!r} is not simulated; use tp and dp")
    return sizes


def _cost(config: EngineConfig, cfg: ModelConfig, sizes: dict[str, int]) -> ModelCost:
    """Of one replica, bytes over its devices together."""
    copies = kv_copies(cfg, load_rules(config.sharding_rules), sizes)
    if not cfg.cache_row.is_cut:
        copies = sizes.get("tp", 1)
    dtype = "bfloat16" if config.dtype == "auto" else config.dtype
    cost = model_cost(cfg, weight_dtype=dtype, kv_dtype=kv_name(config), kv_copies=copies)
    if config.quantization not in QUANTIZED:
        return cost
    share = ITEM_BYTES[QUANTIZED[config.quantization]] / ITEM_BYTES[dtype]
    return dataclasses.replace(
        cost,
        block_bytes=cost.block_bytes * share,
        expert_bytes=cost.expert_bytes * share,
    )


def weight_bytes(cost: ModelCost, cfg: ModelConfig) -> float:
    """Of one replica's weights, tables included."""
    return cost.block_bytes + cost.expert_bytes + cost.head_bytes * (1 if cfg.tie_word_embeddings else 2)


def kv_name(config: EngineConfig) -> str:
    """Data type of the cache, as the cost model calls it."""
    return {"auto": "bfloat16", "fp8": "float8"}.get(config.kv_dtype, config.kv_dtype)


def _shapes(
    config: EngineConfig, cfg: ModelConfig, hardware: Hardware, cost: ModelCost, *, tp: int, dp: int
) -> RunnerShapes:
    num_pages = _num_pages(config, cfg, hardware, cost, tp)
    capacity = (num_pages - 1) * config.page_size
    longest = config.max_model_len or min(cfg.max_position_embeddings, max(capacity, 1))
    if longest > cfg.position_limit:
        raise ValueError(f"max_model_len={longest} exceeds the {cfg.position_limit} positions of the model; lower it")
    if capacity < longest:
        raise ValueError(
            f"the KV cache holds {max(capacity, 0):,} tokens, fewer than max_model_len={longest}; use more devices, a "
            "smaller dtype, or a lower max_model_len"
        )
    dtype = jnp.dtype("bfloat16")
    return RunnerShapes(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.token_budget,
        max_model_len=longest,
        vocab_size=cfg.vocab_size,
        num_pages=num_pages,
        page_size=config.page_size,
        token_buckets=(config.token_budget,),
        row_buckets=(config.max_num_seqs,),
        max_decode_steps=config.max_decode_steps,
        kv_dtype=dtype,
        residual_dtype=dtype,
        num_replicas=dp,
        speculation=config.speculative,
        speculating_rows=config.max_num_seqs,  # whether drafts pay is decided by the times of the modelled device
    )


def _num_pages(config: EngineConfig, cfg: ModelConfig, hardware: Hardware, cost: ModelCost, tp: int) -> int:
    """Pages of one replica: as many as were asked for, as the profiled engine had, or as the devices have room for."""
    token_bytes = cost.kv_bytes * cfg.num_layers
    if config.kv_cache_memory_bytes is not None:
        return int(config.kv_cache_memory_bytes // (token_bytes * config.page_size))
    if hardware.profile is not None and "num_pages" in hardware.profile.engine:
        measured = hardware.profile.engine
        return math.ceil(measured["num_pages"] * measured["page_size"] / config.page_size)
    weights = weight_bytes(cost, cfg)
    memory = hardware.chip.memory
    if memory is None:
        raise ValueError(f"the memory of {hardware.chip.title} is not known; set --kv-cache-memory-bytes")
    room = tp * (memory * config.gpu_memory_utilization - _TEMPORARY_BYTES) - weights
    if room <= 0:
        raise ValueError(
            f"{config.model} takes {weights / 1e9:.1f} GB of weights and {tp} x {hardware.chip.title} have "
            f"{(room + weights) / 1e9:.1f} GB for them; use more devices or a smaller dtype"
        )
    return int(room // (token_bytes * config.page_size))
