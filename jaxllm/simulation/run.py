"""One simulation from its configuration: engines and workload are made, run, and reported; or many, over rates.

`EngineConfig` and `SimulationConfig` -> the report of `jaxllm simulate --json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.config import EngineConfig, ModelConfig
from jaxllm.families.presets import model_config
from jaxllm.pool.config import PoolConfig, read_models
from jaxllm.roofline.chips import Chip, find_chip
from jaxllm.roofline.iteration_time import Efficiency
from jaxllm.roofline.profile import Profile, load_profile
from jaxllm.scheduling.pace import DEFAULT_SECONDS
from jaxllm.simulation.arrivals import Arrival, at_rate, for_models, random_arrivals, stretched, trace_arrivals
from jaxllm.simulation.clock import VirtualClock
from jaxllm.simulation.config import SimulationConfig, parse_sweep
from jaxllm.simulation.disaggregated import Disaggregated, link_bandwidth
from jaxllm.simulation.fleet import Colocated, Fleet, Results, simulate
from jaxllm.simulation.paper_engine import Hardware, PaperEngine, Policy, paper_engine, weight_bytes
from jaxllm.simulation.policies import POLICIES, hand_over
from jaxllm.simulation.pooled import Pooled
from jaxllm.simulation.report import make_report

NUM_PROMPTS = 1000
_LEAST, _MOST = 150, 10_000  # requests of one of many runs
_SECONDS, _LIMITS = 30, 10  # that arrivals last at least; how many times the longest limit
_BISECTIONS = 5
OnSent = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a simulation needs of the outside, read once."""

    config: EngineConfig
    model: ModelConfig
    hardware: Hardware
    sim: SimulationConfig

    @property
    def longest(self) -> int:
        """Tokens of the longest request, as far as configurations say."""
        return self.config.max_model_len or self.model.position_limit


def set_up(engine: Mapping[str, Any], sim: SimulationConfig, *, progress: bool = True) -> Setup:
    """Read the model's configuration and the chip.

    Args:
        engine: engine settings that were given; with a profile, the others are those that it was measured with.
        sim: what is simulated.
        progress: show downloads.

    Raises:
        ValueError: in one line, what to change.
    """
    profile = load_profile(Path(sim.chip)) if sim.chip.endswith(".json") else None
    given = dict(engine)
    if profile is not None:
        given = _as_measured(profile, given)
    if given.get("disk_kv_bytes"):
        given["disk_kv_path"] = "on paper"
    config = EngineConfig(**given)
    if (sim.acceptance_rate is None) != (config.speculative is None):
        raise ValueError("speculative_config and acceptance_rate belong together; set both or neither")
    model = model_config(config.model, progress=progress)
    efficiency = Efficiency(
        compute=sim.compute_efficiency,
        memory=sim.memory_efficiency,
        collective_s=1e-6 * sim.collective_us,
        host_s=1e-3 * sim.host_ms,
    )
    chip = _measured_chip(profile) if profile else find_chip(sim.chip)
    hardware = Hardware(
        chip=chip,
        efficiency=efficiency,
        profile=profile,
        host_link=link_bandwidth(sim.host_link, chip, "host_link"),
        disk_rate=1e9 * sim.disk_gb_per_s,
        acceptance=sim.acceptance_rate,
    )
    return Setup(config, model, hardware, sim)


def _as_measured(profile: Profile, given: dict[str, Any]) -> dict[str, Any]:
    """Engine settings with those of the profile in place of what was not given."""
    names = {field.name for field in dataclasses.fields(EngineConfig)}
    measured = {"model": profile.model, **{k: v for k, v in profile.engine.items() if k in names}}
    for name in ("model", "mesh", "dtype", "kv_dtype"):
        if name in given and given[name] != measured.get(name, given[name]):
            raise ValueError(
                f"the profile was measured with {name}={measured[name]}, not {given[name]}; calibrate again, or leave "
                f"--{name.replace('_', '-')} out"
            )
    return measured | given


def _measured_chip(profile: Profile) -> Chip:
    rate, bandwidth = profile.flops_per_s / profile.num_devices, profile.bytes_per_s / profile.num_devices
    return Chip(name="profile", title=profile.device, flops=rate, flops_8bit=rate, bandwidth=bandwidth, memory=None)


def make_arrivals(setup: Setup) -> Iterator[Arrival]:
    """The workload."""
    sim, seed = setup.sim, setup.config.seed
    if sim.trace is not None:
        arrivals = trace_arrivals(
            Path(sim.trace), sim.num_prompts, setup.longest, scale=sim.scale_lengths, skip_longer=sim.skip_longer
        )
        if sim.request_rate is None:
            return stretched(arrivals, sim.time_scale) if sim.time_scale != 1.0 else arrivals
    else:
        count = sim.num_prompts or NUM_PROMPTS
        if sim.input_len + sim.output_len > setup.longest:
            raise ValueError(
                f"{sim.input_len} + {sim.output_len} tokens exceed the {setup.longest} that a request may have; lower "
                "--input-len or --output-len"
            )
        arrivals = random_arrivals(count, sim.input_len, sim.output_len, spread=sim.length_spread, seed=seed)
    rate = math.inf if sim.request_rate is None else sim.request_rate
    return at_rate(arrivals, rate, sim.arrivals, burstiness=sim.burstiness, burst_size=sim.burst_size, seed=seed)


def make_fleet(setup: Setup) -> Fleet:
    """The engines that the configuration describes."""
    sim = setup.sim
    if sim.models:
        return _pool(setup)
    if sim.prefill_mesh is not None and sim.decode_mesh is not None:
        prefill = [one_engine(setup, sim.prefill_mesh) for _ in range(sim.prefill_replicas)]
        found = dataclasses.replace(setup, config=dataclasses.replace(setup.config, enable_prefix_caching=True))
        decode = [one_engine(found, sim.decode_mesh, hand_over) for _ in range(sim.decode_replicas)]
        return Disaggregated(prefill, decode, bytes_per_s=link_bandwidth(sim.transfer, setup.hardware.chip))
    engines = [one_engine(setup, setup.config.mesh) for _ in range(sim.replicas)]
    if sim.stream and sim.policy == "chunked":
        for paper in engines:  # as a server does
            paper.engine.pace.target = sim.limits.get("tpot", DEFAULT_SECONDS)
    return Colocated(engines, streamed=sim.stream)


def _pool(setup: Setup) -> Pooled:
    """A pool as `jaxllm serve --models` has it, on as many instances as there are replicas."""
    own = {field.name: getattr(setup.config, field.name) for field in dataclasses.fields(EngineConfig)}
    settings, entries = read_models(setup.sim.models, own)
    pool = PoolConfig(**settings)
    setups = {}
    for entry in entries:
        config = entry.engine_config()
        setups[entry.name] = dataclasses.replace(setup, config=config, model=model_config(config.model))

    def make(name: str, clock: VirtualClock) -> PaperEngine:
        one = setups[name]
        return paper_engine(one.config, one.model, one.hardware, clock=clock)

    samples = {name: make(name, VirtualClock()) for name in setups}
    weights = {name: weight_bytes(paper.runner.cost, setups[name].model) for name, paper in samples.items()}
    devices = max(paper.num_devices for paper in samples.values())
    return Pooled(
        weights,
        make,
        num_instances=setup.sim.replicas,
        policy=pool.policy,
        tbt=pool.tpot,
        bytes_per_s=devices * setup.hardware.host_link,
    )


def one_engine(setup: Setup, mesh: str, policy: Policy | None = None) -> PaperEngine:
    """One of them."""
    config, policy = dataclasses.replace(setup.config, mesh=mesh), policy or POLICIES[setup.sim.policy]
    if not policy.chunked_prefill:  # prompts are whole, so an iteration must have room for the longest
        longest = config.max_model_len or min(setup.longest, setup.model.max_position_embeddings)
        config = dataclasses.replace(config, max_num_batched_tokens=longest + config.max_num_seqs)
    return paper_engine(config, setup.model, setup.hardware, policy=policy)


def run_once(setup: Setup, on_sent: OnSent = lambda _: None, *, most_missed: float = math.inf) -> dict[str, Any]:
    """Simulate and report.

    Args:
        setup: what.
        on_sent: see `simulate`.
        most_missed: where more requests than that have missed the SLO the rest is left out; the report then has
            `gave_up`, and its figures are of what there was.
    """
    fleet = make_fleet(setup)
    setup = dataclasses.replace(setup, config=_within(setup.config, fleet))
    arrivals = make_arrivals(setup)
    if isinstance(fleet, Pooled):
        arrivals = for_models(arrivals, fleet.models, seed=setup.config.seed)
    limits = setup.sim.limits

    def is_lost(results: Results, now: float) -> bool:
        return sum(outcome.has_missed(limits, now) for outcome in results.outcomes) > most_missed

    results = simulate(fleet, arrivals, on_sent, is_lost if most_missed < math.inf else lambda *_: False)
    if not results.outcomes:
        raise ValueError("the workload has no requests")
    results.figures |= fleet.figures(limits)
    report = make_report(results, fleet, slo=limits, price_per_hour=setup.sim.price)
    return {**describe(setup), **report, **({"gave_up": True} if results.gave_up else {})}


def _within(config: EngineConfig, fleet: Fleet) -> EngineConfig:
    """With the longest request that every engine's cache holds."""
    engines = fleet.samples.values() if isinstance(fleet, Pooled) else fleet.engines
    longest = min(engine.runner.shapes.max_model_len for engine in engines)
    return dataclasses.replace(config, max_model_len=longest)


def describe(setup: Setup) -> dict[str, Any]:
    """What was simulated, for the report."""
    sim, config = setup.sim, setup.config
    rate = sim.request_rate
    return {
        "model": f"a pool of {len(sim.models)}" if sim.models else config.model,
        "chip": setup.hardware.chip.title,
        **_layout(sim, config),
        "policy": sim.policy,
        "request_rate": "inf" if rate is not None and math.isinf(rate) else rate,
        "source": setup.hardware.profile.source if setup.hardware.profile else "data sheet",
    }


def _layout(sim: SimulationConfig, config: EngineConfig) -> dict[str, Any]:
    if sim.models:
        return {"models": list(sim.models), "mesh": config.mesh, "replicas": sim.replicas}
    if sim.prefill_mesh is None:
        return {"mesh": config.mesh, "replicas": sim.replicas}
    prefill, decode = (sim.prefill_mesh, sim.prefill_replicas), (sim.decode_mesh, sim.decode_replicas)
    words = [f"{count} x {mesh}" if count > 1 else f"{mesh}" for mesh, count in (prefill, decode)]
    return {"mesh": f"{words[0]} -> {words[1]}", "prefill_mesh": sim.prefill_mesh, "decode_mesh": sim.decode_mesh}


def num_requests(sim: SimulationConfig, rate: float) -> int:
    """Of a run that is to tell whether a rate holds.

    Arrivals must last long against the limits: any number of requests can come at once and be served within ten seconds
    if they are few enough. `num_prompts` asks for more than that, not for fewer.
    """
    limits = sim.limits
    seconds = max(_SECONDS, _LIMITS * max((limits[name] for name in ("ttft", "e2e") if name in limits), default=0.0))
    return max(_LEAST, sim.num_prompts or 0, math.ceil(min(_MOST, seconds * rate)))


def at_rate_long_enough(setup: Setup, rate: float) -> Setup:
    """The same at this rate, with as many requests as that takes."""
    sim = setup.sim.with_rate(rate)
    return dataclasses.replace(setup, sim=dataclasses.replace(sim, num_prompts=num_requests(sim, rate)))


def sweep(setup: Setup, on_sent: OnSent = lambda _: None) -> dict[str, Any]:
    """The report at the highest rate at which enough requests meet the SLO, with all that were tried under `sweep`.

    Over a range: its ends, then bisection, in which a rate that holds is taken to hold below as well.
    """
    assert setup.sim.sweep is not None
    rates, is_range = parse_sweep(setup.sim.sweep)
    if not setup.sim.limits:
        raise ValueError("a sweep looks for the highest rate at which an SLO holds; set --slo")
    tried: dict[float, dict[str, Any]] = {}

    def holds(rate: float) -> bool:
        tried[rate] = run_once(at_rate_long_enough(setup, rate), on_sent)
        return tried[rate]["slo_attainment"] >= setup.sim.attainment

    if is_range:
        low, high = rates
        highest = None if not holds(low) else high if holds(high) else bisect(holds, low, high)
    else:
        highest = max([rate for rate in rates if holds(rate)], default=None)
    best = tried[highest] if highest is not None else tried[min(tried)]
    return {**best, "highest_rate": highest, "sweep": [tried[rate] for rate in sorted(tried)]}


def bisect(holds: Callable[[float], bool], low: float, high: float, steps: int = _BISECTIONS) -> float:
    """The highest rate found that holds, where `low` does and `high` does not."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
